"""Sequences of several lengths as one model input: packed end to end, or padded to a rectangle.

Packed, they lie in one row and nothing is computed that nobody needs. Position ids start anew with each
sequence, and attention stays within it: on CUDA by PyTorch's variable-length flash attention, elsewhere
sequence by sequence, which costs the sum of squared lengths (a block mask over the row would cost the square
of the sum). What each layer may attend to, a window for example, is transformers' own rule for it
(`masks.py`). Elsewhere, too, a beginning that sequences share lies in the row once (`prefixes.py`); on CUDA
that has not been run, and each has its own.

Padded, the padding stands on the right, where no real token of a causal model ever attends to it; no mask is
needed.
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

from fopd_cli.engines.models.hf import backbone, own_attention
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.masks import MaskPattern, keep_rule, laid_out
from fopd_cli.engines.tokens.prefixes import SharedRow
from fopd_cli.engines.transformers import cpu_attention

PACKED_ATTENTION = {
    "sdpa": "fopd_packed",
    "eager": "fopd_packed_eager",
}  # by what the model has when it is not packed
VARLEN_WIDTH = 256  # of a head, at most
ROW = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "prefixes",
)  # what says where segments lie


@dataclass
class TokenBatch:
    """One model input and where each sequence lies in it."""

    ids: Tensor  # int64 (rows, width)
    places: list[np.ndarray]  # int64 (length,) of each sequence: where its tokens lie in `ids.flatten()`
    extra: dict[str, Any] = field(default_factory=dict)  # what a packed row needs beside its ids

    @classmethod
    def of(
        cls, sequences: Sequence[np.ndarray], packed: bool, device: torch.device, shared: bool = True
    ) -> TokenBatch:
        """Token ids `(length,)` each, in order. Packed ones need a model that `enable_packing` has seen.

        `shared`: what sequences begin with may lie in the row once; not where it depends on how long each is
        (`rope.by_length`).
        """
        return _packed(sequences, device, shared) if packed else _padded(sequences, device)

    def hidden(self, lm: Any) -> Tensor:
        """Post-norm hidden states `(rows x width, hidden)`, padding included."""
        extra = self.extra
        if not extra and rope.by_length(lm.config):
            extra = self._lengths()
        with laid_out(self.extra):
            out = backbone(lm)(input_ids=self.ids, use_cache=False, **extra).last_hidden_state
        return out.flatten(0, 1)

    def _lengths(self) -> dict[str, Tensor]:
        """Positions that say how long each row is; without a mask, transformers would take the repeated ones
        for packed rows.
        """
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        last = torch.tensor([len(own) - 1 for own in self.places], device=self.ids.device)
        return {
            "position_ids": torch.minimum(place[None], last[:, None]),
            "attention_mask": torch.ones_like(self.ids),
        }


def _padded(sequences: Sequence[np.ndarray], device: torch.device) -> TokenBatch:
    width = max(len(s) for s in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)  # id 0, which no real position ever sees
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    places = [row * width + np.arange(len(s)) for row, s in enumerate(sequences)]
    return TokenBatch(torch.from_numpy(ids).to(device), places)


def _packed(sequences: Sequence[np.ndarray], device: torch.device, shared: bool) -> TokenBatch:
    row = (SharedRow.of if shared and device.type == "cpu" else SharedRow.apart)(sequences)
    bounds, lengths = row.starts, [len(t) for t in row.tokens]
    ids = torch.from_numpy(np.concatenate(row.tokens).astype(np.int64))[None].to(device)
    positions = np.concatenate([start + np.arange(n) for start, n in zip(row.offsets, lengths, strict=True)])
    extra: dict[str, Any] = {"position_ids": torch.from_numpy(positions)[None].to(device)}
    extra["attention_mask"] = torch.ones_like(ids)  # else rules for masks would be made of the row's places
    extra["cu_seq_lens_q"] = extra["cu_seq_lens_k"] = torch.from_numpy(bounds.astype(np.int32)).to(device)
    extra["max_length_q"] = extra["max_length_k"] = max(lengths)  # the names that transformers gives them
    if any(row.prefixes):
        spans = list(pairwise(bounds.tolist()))
        extra["prefixes"] = [[spans[s] for s in before] for before in row.prefixes]
    return TokenBatch(ids, row.places(), extra)


def enable_packing(lm: Any, compiled: bool = False) -> None:
    """Give the model attention that knows of packed rows; `check_packing` says whether the rest of it bears
    them.

    `compiled`: its blocks will be. The variable-length kernel becomes part of their graphs; a loop over as
    many sequences as there happen to be cannot.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    own = own_attention(type(lm), lm.config)
    attention = packed_attention if own == "sdpa" else packed_eager_attention
    make = sdpa_mask if own == "sdpa" else eager_mask
    if compiled and own == "eager":
        attention = torch.compiler.disable(attention)
    _varlen_attention()  # a compiled block takes it as it finds it
    AttentionInterface.register(PACKED_ATTENTION[own], attention)
    AttentionMaskInterface.register(PACKED_ATTENTION[own], functools.partial(keep_rule, make))
    lm.set_attn_implementation(PACKED_ATTENTION[own])


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskPattern | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **told: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a packed row: `(1, heads, tokens, width)` -> `(1, tokens, heads,
    width)`.

    The interface is that of transformers' `AttentionInterface`. Without a mask pattern it is plain causal.
    """
    if dropout or softcap is not None or s_aux is not None or position_bias is not None:
        raise ValueError("its attention has a soft cap, sinks or a bias, which PyTorch's does not know")
    row = _Row.of(attention_mask, told)
    window = None
    if _varlen_fits(query, value) and row.prefixes is None:
        window = 0 if attention_mask is None else attention_mask.sees
    if window is not None:
        out = _varlen_attention()(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            row.bounds,
            row.bounds,
            row.longest,
            row.longest,
            scale=scaling,
            window_size=(window - 1, 0),
        )
        return out[None], None

    return _one_by_one(row, module, query, key, value, attention_mask, scaling), None


@torch.compiler.disable
def _one_by_one(
    row: _Row,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaskPattern | None,
    scaling: float | None,
) -> Tensor:
    """Where there is no variable-length kernel: segment by segment."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        return cpu_attention.attention(module, q, k, v, visible, scaling=scaling, is_causal=True)[0]

    return row.by_segment(attend, query, key, value, mask)


def packed_eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: MaskPattern | None, **told: Any
) -> tuple[Tensor, None]:
    """The same for an architecture whose attention PyTorch's does not know (soft caps, sinks): its own,
    segment by segment.
    """
    if attention_mask is None:
        raise ValueError("its layers attend without a mask")
    row = _Row.of(attention_mask, told)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    own = {name: value for name, value in told.items() if name not in ROW}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = eager(module, q, k, v, mask, **own)[0]
        return found

    return row.by_segment(attend, query, key, value, attention_mask), None


@dataclass
class _Row:
    """Where the segments of a packed row lie."""

    bounds: Tensor  # int32 (segments + 1,)
    longest: int  # segment
    # where in the row what comes before each lies; None: nothing does
    prefixes: Sequence[Sequence[tuple[int, int]]] | None

    @classmethod
    def of(cls, mask: MaskPattern | None, told: dict[str, Any]) -> _Row:
        """By what attention is told, or by its mask where an architecture does not hand it on."""
        found = told if told.get("cu_seq_lens_q") is not None else mask and mask.row
        if not found:
            raise ValueError("its attention is not told where the samples of a row lie")
        return cls(found["cu_seq_lens_q"], found["max_length_q"], found.get("prefixes"))

    def by_segment(
        self,
        attend: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: MaskPattern | None,
    ) -> Tensor:
        """Each segment attends to what comes before it and to itself."""
        parts = []
        spans = list(pairwise(self.bounds.tolist()))
        # Split at once: each slice of its own would have a gradient as long as the row.
        cut = [x.split([stop - start for start, stop in spans], 2) for x in (query, key, value)]
        queried, *held = (dict(zip(spans, pieces, strict=True)) for pieces in cut)
        for segment, span in enumerate(spans):
            seen = [*(self.prefixes[segment] if self.prefixes else ()), span]
            q = queried[span]
            k, v = (_joined([x[s] for s in seen]) for x in held)
            queries, keys = q.shape[2], k.shape[2]
            visible = _causal(queries, keys, q.device) if mask is None else mask.of(queries, keys)
            parts.append(attend(q, k, v, visible))
        return _joined(parts, 1)


def _joined(parts: list[Tensor], axis: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor | None:
    """bool `(queries, keys)`, the queries being the last of the keys; None: a square, which kernels know."""
    if queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Whether there is a variable-length kernel for them."""
    narrow = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return narrow and query.shape[-1] == value.shape[-1] <= VARLEN_WIDTH


_VARLEN: list[Callable[..., Tensor]] = []  # no functools.cache: a compiled block would look behind it


def _varlen_attention() -> Callable[..., Tensor]:
    """PyTorch's, told that there may be fewer key than query heads where its version wants to be told (2.13;
    2.11 not).
    """
    if not _VARLEN:
        from torch.nn.attention import varlen

        plain: Any = varlen.varlen_attn
        told = "enable_gqa" in inspect.signature(plain).parameters
        _VARLEN.append(functools.partial(plain, enable_gqa=True) if told else plain)
    return _VARLEN[0]
