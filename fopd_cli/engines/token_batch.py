"""Sequences of several lengths as one model input: packed end to end, or padded to a rectangle.

Packed, they lie in one row and nothing is computed that nobody needs. Position ids start anew with each sequence, and
attention stays within it: on CUDA by PyTorch's variable-length flash attention, elsewhere sequence by sequence, which
costs the sum of squared lengths (a block mask over the row would cost the square of the sum). Elsewhere, too, a beginning
that sequences share lies in the row once (`prefixes.py`); on CUDA that has not been run, and each has its own.

Padded, the padding stands on the right, where no real token of a causal model ever attends to it; no mask is needed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines import cpu_attention
from fopd_cli.engines.hf import backbone
from fopd_cli.engines.prefixes import SharedRow

PACKED_ATTENTION = "fopd_packed"


@dataclass
class TokenBatch:
    """One model input and where each sequence lies in it."""

    ids: Tensor  # int64 (rows, width)
    places: list[np.ndarray]  # int64 (length,) of each sequence: where its tokens lie in `ids.flatten()`
    extra: dict[str, Any] = field(default_factory=dict)  # what a packed row needs beside its ids

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], packed: bool, device: torch.device) -> TokenBatch:
        """Token ids `(length,)` each, in order. Packed ones need a model that `enable_packing` has seen."""
        return (_packed if packed else _padded)(sequences, device)

    def hidden(self, lm: Any) -> Tensor:
        """Post-norm hidden states `(rows x width, hidden)`, padding included."""
        out = backbone(lm)(input_ids=self.ids, use_cache=False, **self.extra).last_hidden_state
        return out.flatten(0, 1)


def _padded(sequences: Sequence[np.ndarray], device: torch.device) -> TokenBatch:
    width = max(len(s) for s in sequences)
    ids = np.zeros((len(sequences), width), dtype=np.int64)  # id 0, which no real position ever sees
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    places = [row * width + np.arange(len(s)) for row, s in enumerate(sequences)]
    return TokenBatch(torch.from_numpy(ids).to(device), places)


def _packed(sequences: Sequence[np.ndarray], device: torch.device) -> TokenBatch:
    row = SharedRow.of(sequences) if device.type == "cpu" else SharedRow.apart(sequences)
    bounds, lengths = row.starts, [len(t) for t in row.tokens]
    ids = torch.from_numpy(np.concatenate(row.tokens).astype(np.int64))
    positions = np.concatenate([start + np.arange(n) for start, n in zip(row.offsets, lengths, strict=True)])
    extra: dict[str, Any] = {"position_ids": torch.from_numpy(positions)[None].to(device)}
    extra["cu_seq_lens_q"] = extra["cu_seq_lens_k"] = torch.from_numpy(bounds.astype(np.int32)).to(device)
    extra["max_length_q"] = extra["max_length_k"] = max(lengths)  # the names that transformers gives them
    if any(row.prefixes):
        spans = list(pairwise(bounds.tolist()))
        extra["prefixes"] = [[spans[s] for s in before] for before in row.prefixes]
    return TokenBatch(ids[None].to(device), row.places(), extra)


def enable_packing(lm: Any, compiled: bool = False) -> None:
    """Give the model attention that knows of packed rows; `check_packing` says whether the rest of it bears them.

    `compiled`: the model will be, and must not look into a loop over as many sequences as there happen to be.
    """
    from transformers import AttentionInterface

    attention = torch.compiler.disable(packed_attention) if compiled else packed_attention
    AttentionInterface.register(PACKED_ATTENTION, attention)
    lm.set_attn_implementation(PACKED_ATTENTION)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cu_seq_lens_q: Tensor,
    max_length_q: int, scaling: float | None = None, sliding_window: int | None = None, dropout: float = 0.0,
    softcap: float | None = None, s_aux: Tensor | None = None,
    prefixes: Sequence[Sequence[tuple[int, int]]] | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each sequence of a packed row: `(1, heads, tokens, width)` -> `(1, tokens, heads, width)`.

    The interface is that of transformers' `AttentionInterface`. `cu_seq_lens_q` bounds the segments of the row, `prefixes` says
    for each where in the row what comes before it lies; None: nothing does.
    """
    if dropout or softcap is not None or s_aux is not None:
        raise ValueError("attention dropout, soft caps and sinks are not known here")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out = _varlen_attention()(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, window_size=window
        )
        return out[None], None
    parts = []
    bounds: list[int] = cu_seq_lens_q.tolist()
    for segment, span in enumerate(pairwise(bounds)):
        seen = [*(prefixes[segment] if prefixes else ()), span]
        q = query[:, :, slice(*span)]
        k, v = (_joined([x[:, :, slice(*s)] for s in seen]) for x in (key, value))
        mask = _band(q.shape[2], k.shape[2], sliding_window, query.device)
        parts.append(cpu_attention.attention(module, q, k, v, mask, scaling=scaling, is_causal=True)[0])
    return _joined(parts, 1), None


def _joined(parts: list[Tensor], axis: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


@functools.cache
def _varlen_attention() -> Callable[..., Tensor]:
    """PyTorch's, told that there may be fewer key than query heads where its version wants to be told (2.13; 2.11 not)."""
    from torch.nn.attention import varlen

    plain: Any = varlen.varlen_attn
    told = "enable_gqa" in inspect.signature(plain).parameters
    return functools.partial(plain, enable_gqa=True) if told else plain


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool `(queries, keys)`, the queries being the last of the keys: for each the last `window` up to it. None where it is
    plain causal attention of a square."""
    if queries == keys and (window is None or keys <= window):
        return None
    place = torch.arange(keys, device=device)
    distance = place[keys - queries :, None] - place[None]
    return (distance >= 0) & (distance < (keys if window is None else window))
