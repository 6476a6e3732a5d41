"""What `learner.compile` compiles, also with activation checkpointing, and on the path that a GPU takes.

PyTorch's variable-length attention is two operators without CPU kernels. Here they get some, one sequence at
a time, so that we trace, compile and differentiate the code that runs on CUDA, with real numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fopd_cli.engines.tokens import token_batch
from fopd_cli.samples import Sample


@pytest.fixture(scope="module")
def samples(pair: Path) -> list[Sample]:
    return kit.make_samples(pair)


def weights_of(q: Tensor, k: Tensor, scale: float, window: Any) -> Tensor:
    """Attention weights within one sequence, `(heads, tokens, tokens)`."""
    ago = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None]
    seen = (ago >= 0) & ((ago <= window[0]) | (window[0] < 0))
    return torch.softmax((q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf), -1)


def sequences(bounds: Tensor, *rows: Tensor) -> Iterator[list[Tensor]]:
    """`(tokens, heads, width)` -> `(query heads, tokens, width)` of each sequence in turn."""
    heads = rows[0].shape[1]
    for a, b in pairwise(bounds.tolist()):
        yield [x[a:b].transpose(0, 1).repeat_interleave(heads // x.shape[1], 0) for x in rows]


def forward_kernel(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bounds, scale, window = *given[:4], given[8], given[9]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = [weights_of(a, b, scale, window) @ c for a, b, c in sequences(bounds, q, k, v)]
    joined = torch.cat([o.transpose(0, 1) for o in out]).contiguous()
    return joined, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def backward_kernel(*given: Any) -> tuple[Tensor, ...]:
    grad, q, k, v, bounds, scale, window = *given[:4], given[6], given[12], given[13]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found: list[list[Tensor]] = [[], [], []]
    for a, b, c, g in sequences(bounds, q, k, v, grad):
        weights = weights_of(a, b, scale, window)
        by_weight = g @ c.transpose(-1, -2)
        by_score = scale * weights * (by_weight - (by_weight * weights).sum(-1, keepdim=True))
        own = by_score @ b, by_score.transpose(-1, -2) @ a, weights.transpose(-1, -2) @ g
        for parts, part, given_rows in zip(found, own, (q, k, v), strict=True):
            shared = part.unflatten(0, (given_rows.shape[1], -1)).sum(1)
            parts.append(shared.transpose(0, 1))
    return tuple(torch.cat(parts).contiguous() for parts in found)


@functools.cache
def give_kernels() -> None:
    """Give the operators CPU kernels."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu", forward_kernel)
    varlen._varlen_attn_backward.register_kernel("cpu", backward_kernel)


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packed rows take the variable-length kernel. Graphs are traced and differentiated, then run directly:
    compiling them to C++ would prove nothing here, and takes a minute.
    """
    give_kernels()
    monkeypatch.setattr(token_batch, "_varlen_fits", lambda query, value: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_block_is_one_graph_with_its_attention(
    pair: Path, samples: list[Sample], as_on_cuda: None, checkpointing: bool
) -> None:
    """Also under checkpointing. Its gradients are plain PyTorch's. A second row needs a second graph, which
    fits any length, so a third row needs none.
    """
    cfg = kit.config(activation_checkpointing=checkpointing, compile=True, micro_tokens=30)
    loss, expected = kit.reference(pair, samples, cfg)
    learner = kit.make_learner(pair, cfg)
    learner.shared = False  # as on CUDA: samples share nothing
    report = learner.train(0, samples)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in kit.gradients(learner).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)
    assert dict(counters["graph_break"]) == {}
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    learner.train(1, samples[::-1])
    learner.train(2, samples[2:])
    assert counters["stats"]["unique_graphs"] == made
