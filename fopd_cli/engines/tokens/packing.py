"""Whether a model may be packed: asked of the model itself, where it will run.

Rounding is no reason to refuse. A row of another length may run other kernels, and in float32 the hidden
states of a 30-layer model then move by 1e-5 of their size. So two questions are asked that tell an error from
rounding, and both answers are held against what rounding does to this model here, which is measured, too:

    leak      does a sequence move when only its *neighbours* change? Rounding does not care who they are; a
              state that runs on from one sequence into the next moves its first positions by their own size
    distance  is a sequence in a packed row what it is alone, under the model's own attention? A window or a
              rope that packing loses moves its last positions far, hence a probe longer than each of them;
              and a short one beside a neighbour longer than all, whose length must not become its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.models.hf import own_attention, text_config
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.token_batch import TokenBatch
from fopd_cli.errors import UserError

TOLERANCE = {torch.float32: 1e-3}  # of a hidden state's norm; an error is of its own size
NARROW_TOLERANCE = 3e-2  # the same for bfloat16 and float16
TIMES_ROUNDING = 10  # or so many times what rounding does, if that is more
LOOK_AT = 4  # positions at the end where the error would be
NEIGHBOUR, SHORT = 7, 12  # tokens
PAST = 8  # tokens of a probe past a window
WINDOWS = ("window", "chunk", "local")  # in the names that configurations give them


@torch.no_grad()
def check_packing(
    hidden: Callable[[TokenBatch], Tensor], lm: Any, vocab: int, longest: int, device: torch.device, key: str
) -> None:
    """Raise `UserError` unless a sequence in a packed row is what it is alone.

    `hidden` runs `lm`, whose packing is enabled, as it will be run, `(tokens, width)`; a collective if it is
    sharded. `longest` is how many tokens a sample can have: windows that none reaches are not probed. `key`
    names the recipe's switch.
    """
    name, lengths = type(lm).__name__, _lengths(lm.config, longest)
    for tokens in lengths:
        beside = lengths[-1] if tokens == SHORT != lengths[-1] else NEIGHBOUR
        try:
            leak, distance, rounding = _probe(hidden, lm, vocab, tokens, beside, device)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
            # An argument that this architecture does not take, or a mask that it wants to look into.
            raise UserError(
                f"{key}: {name} cannot be packed ({_first_line(error)}); set {key}: false"
            ) from None
        tolerance = max(TOLERANCE.get(lm.dtype, NARROW_TOLERANCE), TIMES_ROUNDING * rounding)
        if max(leak, distance) > tolerance:
            what = (
                "a sample changes with its neighbours"
                if leak > tolerance
                else "a sample is not what it is alone"
            )
            raise UserError(
                f"{key}: {name} gives other hidden states when samples are packed into one row: {what} (at "
                f"{tokens} tokens by {max(leak, distance):.1%}); set {key}: false"
            )


@torch.no_grad()
def check_looks_back(hidden: Callable[[TokenBatch], Tensor], lm: Any, device: torch.device, key: str) -> None:
    """`hf.check_causal` by hidden states, for a model that is sharded; `hidden` as of `check_packing`."""
    with _own_attention(lm):
        rows = TokenBatch.of([np.array([0, 1, 2]), np.array([0, 1, 3])], False, device)
        first, other = hidden(rows).float().unflatten(0, (2, 3))[:, :2]
    if _relative(first, other, slice(None)) > NARROW_TOLERANCE:
        raise UserError(
            f"{key}: {type(lm).__name__} looks ahead, and only causal language models can be distilled"
        )


def _probe(
    hidden: Callable[[TokenBatch], Tensor],
    lm: Any,
    vocab: int,
    tokens: int,
    beside: int,
    device: torch.device,
) -> tuple[float, float, float]:
    """(leak, distance, rounding) of a sequence of so many tokens after one of `beside`, relative to its
    hidden states.
    """
    rng = np.random.Generator(np.random.PCG64(tokens))
    left, own, right = (rng.integers(0, vocab, size=n) for n in (beside, tokens, NEIGHBOUR))

    def in_row(before: np.ndarray, after: np.ndarray) -> Tensor:
        row = TokenBatch.of([before, own, after], True, device)
        return hidden(row)[len(before) : len(before) + len(own)].float()

    packed = in_row(left, right)
    moved = in_row((left + 1) % vocab, (right + 1) % vocab)
    with _own_attention(lm):
        alone = hidden(TokenBatch.of([own], False, device)).float()
        wider = hidden(TokenBatch.of([own, np.resize(own, tokens + 1)], False, device))[: len(own)].float()
    first, last = slice(LOOK_AT), slice(-LOOK_AT, None)
    rounding = max(_relative(wider, alone, at) for at in (first, last))
    return _relative(moved, packed, first), _relative(packed, alone, last), rounding


def _relative(found: Tensor, expected: Tensor, at: slice) -> float:
    """Mean over some positions of the difference's norm by the expected one's; both `(tokens, width)`."""
    norm = expected[at].norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((found[at] - expected[at]).norm(dim=-1) / norm).mean())


@contextmanager
def _own_attention(lm: Any) -> Iterator[None]:
    """The model as it is when it is not packed."""
    packed = lm.config._attn_implementation
    lm.set_attn_implementation(own_attention(type(lm), lm.config))
    try:
        yield
    finally:
        lm.set_attn_implementation(packed)


def _lengths(config: Any, longest: int) -> Sequence[int]:
    """Of the probes: a short one, and one past every window, chunk or rope switch that a sample can reach."""
    text = text_config(config)
    ends = [value for name, value in vars(text).items() if any(word in name for word in WINDOWS)] + [
        rope.switch(config)
    ]
    return (
        SHORT,
        *sorted({end + PAST for end in ends if type(end) is int and SHORT < end + PAST <= longest}),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
