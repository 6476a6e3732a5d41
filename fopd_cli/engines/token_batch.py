"""Sequences of several lengths as one model input: packed end to end, or padded to a rectangle.

Packed, they lie in one row and nothing is computed that nobody needs. Position ids start anew with each sequence, and
attention stays within it: on CUDA by PyTorch's variable-length flash attention, elsewhere sequence by sequence, which
costs the sum of squared lengths (a block mask over the row would cost the square of the sum). What each layer may attend
to, a window for example, is transformers' own rule for it (`masks.py`).

Padded, the padding stands on the right, where no real token of a causal model ever attends to it; no mask is needed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines import rope
from fopd_cli.engines.hf import backbone, own_attention
from fopd_cli.engines.masks import MaskPattern, keep_rule, laid_out

PACKED_ATTENTION = {"sdpa": "fopd_packed", "eager": "fopd_packed_eager"}  # by what the model has when it is not packed
VARLEN_WIDTH = 256  # of a head, at most


@dataclass
class TokenBatch:
    """One model input and where each sequence lies in it."""

    ids: Tensor  # int64 (rows, width)
    starts: np.ndarray  # int64 (sequences,): first token of each in `ids.flatten()`
    lengths: np.ndarray  # int64 (sequences,)
    extra: dict[str, Any] = field(default_factory=dict)  # what a packed row needs beside its ids

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], packed: bool, device: torch.device) -> TokenBatch:
        """Token ids `(length,)` each, in order. Packed ones need a model that `enable_packing` has seen."""
        return (_packed if packed else _padded)(sequences, device)

    def hidden(self, lm: Any) -> Tensor:
        """Post-norm hidden states `(rows x width, hidden)`, padding included."""
        extra = self.extra
        if not extra and rope.by_length(lm.config):
            extra = self._lengths()
        with laid_out(self.extra):
            out = backbone(lm)(input_ids=self.ids, use_cache=False, **extra).last_hidden_state
        return out.flatten(0, 1)

    def _lengths(self) -> dict[str, Tensor]:
        """Positions that say how long each row is; without a mask, transformers would take the repeated ones for packed rows."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        last = torch.from_numpy(self.lengths - 1).to(self.ids.device)
        return {"position_ids": torch.minimum(place[None], last[:, None]), "attention_mask": torch.ones_like(self.ids)}


def _padded(sequences: Sequence[np.ndarray], device: torch.device) -> TokenBatch:
    width = max(len(s) for s in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)  # id 0, which no real position ever sees
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = np.array([len(s) for s in sequences])
    return TokenBatch(torch.from_numpy(ids).to(device), np.arange(len(sequences)) * width, lengths)


def _packed(sequences: Sequence[np.ndarray], device: torch.device) -> TokenBatch:
    lengths = [len(s) for s in sequences]
    bounds = np.cumsum([0, *lengths])
    ids = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))
    extra: dict[str, Any] = {"position_ids": positions[None].to(device)}
    extra["attention_mask"] = torch.ones_like(ids)[None].to(
        device
    )  # else rules for masks would be made of the row's places
    extra["cu_seq_lens_q"] = extra["cu_seq_lens_k"] = torch.from_numpy(bounds.astype(np.int32)).to(device)
    extra["max_length_q"] = extra["max_length_k"] = max(lengths)  # the names that transformers gives them
    return TokenBatch(ids[None].to(device), bounds[:-1], np.array(lengths), extra)


def enable_packing(lm: Any, compiled: bool = False) -> None:
    """Give the model attention that knows of packed rows; `check_packing` says whether the rest of it bears them.

    `compiled`: the model will be, and must not look into a loop over as many sequences as there happen to be.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    own = own_attention(type(lm), lm.config)
    attention = packed_attention if own == "sdpa" else packed_eager_attention
    make = sdpa_mask if own == "sdpa" else eager_mask
    AttentionInterface.register(PACKED_ATTENTION[own], torch.compiler.disable(attention) if compiled else attention)
    AttentionMaskInterface.register(PACKED_ATTENTION[own], functools.partial(keep_rule, make))
    lm.set_attn_implementation(PACKED_ATTENTION[own])


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: MaskPattern | None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int = 0, scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention within each sequence of a packed row: `(1, heads, tokens, width)` -> `(1, tokens, heads, width)`.

    The interface is that of transformers' `AttentionInterface`. Without a mask pattern it is plain causal.
    """
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        raise ValueError("its attention has a soft cap, sinks or a bias, which PyTorch's does not know")
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _bounds(attention_mask)
    window = None
    if _varlen_fits(query, value):
        window = 0 if attention_mask is None else attention_mask.window(max_length_q)
    if window is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = _varlen_attention()(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(window - 1, 0),
        )
        return out[None], None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    parts = []
    bounds: list[int] = cu_seq_lens_q.tolist()
    for start, stop in pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask.of(stop - start, stop - start)
        parts.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=True)[0])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def packed_eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: MaskPattern | None,
    cu_seq_lens_q: Tensor | None = None, **own: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The same for an architecture whose attention PyTorch's does not know (soft caps, sinks): its own, sequence by sequence."""
    if attention_mask is None:
        raise ValueError("its layers attend without a mask")
    if cu_seq_lens_q is None:
        cu_seq_lens_q, _ = _bounds(attention_mask)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    parts = []
    bounds: list[int] = cu_seq_lens_q.tolist()
    for start, stop in pairwise(bounds):
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        parts.append(eager(module, q, k, v, attention_mask.of(stop - start, stop - start), **own)[0])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def _bounds(mask: MaskPattern | None) -> tuple[Tensor, int]:
    """Where the row's sequences lie, by its mask: from an architecture that does not hand it on."""
    if mask is None or mask.row is None:
        raise ValueError("its attention is not told where the samples of a row lie")
    return mask.row["cu_seq_lens_q"], mask.row["max_length_q"]


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Whether there is a variable-length kernel for them."""
    narrow = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return narrow and query.shape[-1] == value.shape[-1] <= VARLEN_WIDTH


@functools.cache
def _varlen_attention() -> Callable[..., Tensor]:
    """PyTorch's, told that there may be fewer key than query heads where its version wants to be told (2.13; 2.11 not)."""
    from torch.nn.attention import varlen

    plain: Any = varlen.varlen_attn
    told = "enable_gqa" in inspect.signature(plain).parameters
    return functools.partial(plain, enable_gqa=True) if told else plain
