"""From hidden states to the objective and its gradients, one chunk of positions at a time; no `[tokens,
vocab]` tensor is ever made.

    L = sum_i w_i share_i ( l_i + lambda D_roll_i )          l_i, D_roll_i: means over sample i's positions

Each chunk's logits, the student's and the teacher's, are computed once. They give the losses, the drifts and,
in the same pass, the gradients for hidden states and head. That is four matrix products per position, as many
as plain PyTorch takes when it keeps all logits; a checkpointed loss takes six. The weight w_i depends on the
drift of the *whole* sample, so chunks end at sample boundaries where samples are short. A sample longer than
a chunk collects its head gradient separately until its weight is known.

The log-probabilities that freshness needs, of the sampled token or of the sampler's top-k under the current
student, come from the same logits, without a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fopd_cli.losses.head import Head
from fopd_cli.losses.kernels import Chunk, CompiledChunk, FullChunk, kernel
from fopd_cli.losses.terms import LossSpec, Positions, TokenTerms


@dataclass
class Weighting:
    """How positions add up. All tensors are `(N,)`; a sample's positions are contiguous, samples in ascending
    order.

    `loss` and `drift` are each position's coefficient in `share_i l_i` and `share_i lambda D_i`; `mean` is
    its share of D_i itself. `weigh(samples, drifts)` returns w_i of some samples (both `(n,)`) without
    gradient; None: all weights are 1.
    """

    sample: Tensor  # int64
    loss: Tensor
    drift: Tensor
    mean: Tensor
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None


def chunked_objective(
    spec: LossSpec,
    hidden: Tensor,
    at: Positions,
    head: Head | Tensor,
    teacher_head: Head | Tensor | None,
    weighting: Weighting,
) -> tuple[Tensor, TokenTerms]:
    """L (a scalar with gradients for `hidden` and `head`) and the terms of all positions.

    `hidden` `(N, student width)` predicts `at.tokens`; `head` and `teacher_head` have V and V' rows, or are
    bare weights `(V, student width)`, `(V', teacher width)` if logits are just the product. Vocabularies that
    differ only in padding are cut to the smaller one, which renormalises both.
    """
    head, teacher = Head.of(head), None if teacher_head is None else Head.of(teacher_head)
    vocab = head.vocab if teacher is None else min(head.vocab, teacher.vocab)
    head, teacher = head.first(vocab), None if teacher is None else teacher.first(vocab)
    learns = (
        torch.is_grad_enabled() and hidden.requires_grad,
        torch.is_grad_enabled() and head.weight.requires_grad,
    )
    value, *terms = _Objective.apply(
        hidden, head.weight, head.bias, spec, at, head, teacher, weighting, learns
    )
    return value, TokenTerms(*terms)


def chunk_rows(spec: LossSpec, head: Tensor) -> int:
    """Positions per chunk. By default a quarter of the head's width, so that the head `(V, width)` is not
    reread for only a few positions (measured: half as many take 1.4 times as long), and at least what fits in
    64 MB, on CUDA 512.
    """
    floor = (512 if head.is_cuda else 64) << 20
    wanted = max(floor, head.numel()) if spec.chunk_bytes is None else spec.chunk_bytes
    return max(1, wanted // (4 * head.shape[0]))


class _Objective(torch.autograd.Function):
    """Gradients are computed in `forward`, while the logits exist; `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: LossSpec,
        at: Positions,
        head: Head,
        teacher: Head | None,
        weighting: Weighting,
        learns: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        pass_ = _Pass(spec, hidden, at, replace(head, weight=weight, bias=bias), teacher, weighting, *learns)
        for group in _groups(weighting.sample, pass_.chunk):
            pass_.visit(group)
        found = pass_.head_gradient
        narrow = None if found is None else found.weight.to(weight.dtype)
        narrow_bias = (
            None if found is None or found.bias is None or bias is None else found.bias.to(bias.dtype)
        )
        ctx.save_for_backward(pass_.hidden_gradient, narrow, narrow_bias)
        terms = tuple(torch.cat(column) for column in zip(*pass_.terms, strict=True))
        ctx.mark_non_differentiable(*terms)
        return (pass_.value, *terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        gradients = ctx.saved_tensors
        if float(upstream[0]) != 1:
            gradients = tuple(None if g is None else g * upstream[0] for g in gradients)
        return (*gradients, None, None, None, None, None, None)


def _groups(sample: Tensor, chunk: int) -> Iterator[list[tuple[int, int]]]:
    """Pieces (start, stop) of at most `chunk` positions: several whole samples as one piece, a long one as
    several.
    """
    ends = [*(torch.nonzero(sample.diff()).flatten() + 1).tolist(), len(sample)]
    start = reached = 0
    for end in ends:
        if end - start > chunk and reached > start:
            yield [(start, reached)]
            start = reached
        reached = end
        if end - start > chunk:
            yield [(i, min(i + chunk, end)) for i in range(start, end, chunk)]
            start = end
    if reached > start:
        yield [(start, reached)]


@dataclass
class _HeadGradient:
    """In float32, whatever the head's own dtype."""

    weight: Tensor  # (V, width)
    bias: Tensor | None  # (V,)

    @classmethod
    def zeros(cls, head: Head) -> _HeadGradient:
        bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32)
        return cls(torch.zeros_like(head.weight, dtype=torch.float32), bias)

    def add(self, logits: Tensor, hidden: Tensor) -> None:
        """Add the part of logit gradients `(n, V)`, in the dtype of the hidden states `(n, width)`."""
        if self.weight.dtype == hidden.dtype:
            self.weight.addmm_(logits.T, hidden)
        else:
            self.weight += logits.T @ hidden
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=torch.float32)

    def add_weighed(self, other: _HeadGradient, weight: Tensor) -> None:
        self.weight += other.weight.mul_(weight)
        if self.bias is not None and other.bias is not None:
            self.bias += other.bias.mul_(weight)


class _Pass:
    """One pass over all positions."""

    def __init__(
        self,
        spec: LossSpec,
        hidden: Tensor,
        at: Positions,
        head: Head,
        teacher: Head | None,
        weighting: Weighting,
        hidden_learns: bool,
        head_learns: bool,
    ) -> None:
        self.spec, self.hidden, self.at, self.head, self.teacher = spec, hidden, at, head, teacher
        self.caps = (head.cap, None if teacher is None else teacher.cap)
        self.weighting, self.learning = weighting, hidden_learns or head_learns
        self.chunk = chunk_rows(spec, head.weight)
        self.terms: list[tuple[Tensor, ...]] = []
        self.value = torch.zeros((), device=hidden.device)
        self.kind = kernel(spec, head.cap)
        # One set of buffers for all chunks: on a CPU, the kernel would map and zero fresh ones of this size.
        shape = (min(self.chunk, len(at.tokens)), head.vocab)
        dtype = head.weight.dtype if self.kind is CompiledChunk else torch.float32
        count = 3 if self.kind is FullChunk else 2
        self._buffers = [torch.empty(shape, dtype=dtype, device=hidden.device) for _ in range(count)]
        self.hidden_gradient = torch.empty_like(hidden) if hidden_learns else None
        # A frozen head (LoRA) costs neither the buffer nor the product.
        self.head_gradient = _HeadGradient.zeros(head) if head_learns else None

    def visit(self, pieces: list[tuple[int, int]]) -> None:
        """Whole samples: weigh, then take gradients. Pieces of one: gradients at weight 1, then weigh."""
        w = self.weighting
        first, last = pieces[0][0], pieces[-1][1]
        if len(pieces) == 1:
            chunk = self._evaluate(first, last)
            self._accumulate(
                chunk, first, last, self._weights(chunk.terms[1], first, last), self.head_gradient
            )
            return
        if w.weigh is None:
            for start, stop in pieces:
                self._accumulate(self._evaluate(start, stop), start, stop, None, self.head_gradient)
            return
        own = None if self.head_gradient is None else _HeadGradient.zeros(self.head)
        before, self.value, drifts = self.value, torch.zeros_like(self.value), []
        for start, stop in pieces:
            chunk = self._evaluate(start, stop)
            drifts.append(chunk.terms[1])
            self._accumulate(chunk, start, stop, None, own)
        weight = self._weights(torch.cat(drifts), first, last)[0]
        self.value = before + weight * self.value
        if self.hidden_gradient is not None:
            self.hidden_gradient[first:last] *= weight
        if own is not None and self.head_gradient is not None:
            self.head_gradient.add_weighed(own, weight)

    def _weights(self, drifts: Tensor, start: int, stop: int) -> Tensor:
        """Each position's w_i, `(stop - start,)`."""
        w = self.weighting
        if w.weigh is None:
            return torch.ones_like(drifts)
        samples, inverse = torch.unique_consecutive(w.sample[start:stop], return_inverse=True)
        share = w.mean[start:stop]
        means = torch.zeros(len(samples), device=drifts.device).index_add(
            0, inverse, torch.where(share > 0, share * drifts, 0.0)
        )
        return w.weigh(samples, means)[inverse]

    def _evaluate(self, start: int, stop: int) -> Chunk:
        at, hidden = self.at.rows(start, stop), self.hidden[start:stop]
        student, teacher, *spare = (b[: stop - start] for b in self._buffers)
        self.head.uncapped(hidden, student)
        if self.teacher is not None and at.teacher_hidden is not None:
            self.teacher.uncapped(at.teacher_hidden.to(self.teacher.weight.dtype), teacher)
        chunk = self.kind(
            self.spec, at, student, teacher, spare[0] if spare else None, self.caps, self.learning
        )
        self.terms.append(chunk.terms)
        return chunk

    def _accumulate(
        self, chunk: Chunk, start: int, stop: int, weights: Tensor | None, head: _HeadGradient | None
    ) -> None:
        w = self.weighting
        a, b = w.loss[start:stop], w.drift[start:stop]
        if weights is not None:
            a, b = a * weights, b * weights
        loss, drifts = chunk.terms[:2]
        self.value = self.value + (a * loss).sum() + torch.where(b != 0, b * drifts, 0.0).sum()
        if not self.learning:
            return
        # gradients are linear in the coefficients: the head's scale costs no extra pass
        if self.head.scale != 1:
            a, b = a * self.head.scale, b * self.head.scale
        hidden, narrow = self.hidden[start:stop], chunk.gradient(a, b).to(self.head.weight.dtype)
        if self.hidden_gradient is not None:
            self.hidden_gradient[start:stop] = narrow @ self.head.weight
        if head is not None:
            head.add(narrow, hidden)
