"""From hidden states to losses and drifts, a chunk of positions at a time: never `[tokens, vocab]` at once.

The student's and the teacher's logits of a chunk are made, used and dropped; the backward pass makes them again
(activation checkpointing), so that extra memory is O(chunk x vocab). What freshness needs, the log-probability of
the sampled token or of the sampler's top-k under the student now, comes out of the same logits: no second forward.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fopd_cli.freshness import drift
from fopd_cli.losses.divergence import LossKind, divergence, kl, policy_gradient

Support = Literal["full", "topk", "sampled"]
DriftKind = Literal["exact", "topk", "sampled"]


@dataclass(frozen=True)
class LossSpec:
    """The recipe's loss, and the drift estimator that rides along."""

    kind: LossKind
    support: Support
    beta: float = 0.5  # of jsd
    temperature: float = 1.0  # of both distributions in the divergence (full and topk support)
    advantage: Literal["cached", "recomputed"] = "recomputed"  # sampled support
    importance: bool = False  # sampled support
    drift: DriftKind = "sampled"
    sampling_temperature: float = 1.0  # at which the behaviour policy sampled, hence that of D_roll
    chunk_bytes: int = 256 << 20  # of one float32 [chunk, vocab] tensor


@dataclass
class Positions:
    """One row per response position (N of them), gathered from all samples of a micro-batch."""

    student_hidden: Tensor  # (N, student width), predicts `tokens`
    tokens: Tensor  # int64 (N,)
    behaviour: Tensor  # float32 (N,): log pi_r(y)
    behaviour_topk: Tensor | None = None  # float32 (N, k), or (N, V) for the exact drift
    behaviour_topk_ids: Tensor | None = None  # int64 (N, k)
    teacher_hidden: Tensor | None = None  # (N, teacher width)
    teacher_logprobs: Tensor | None = None  # float32 (N,): log p(y)
    teacher_topk: Tensor | None = None  # float32 (N, k)
    teacher_topk_ids: Tensor | None = None  # int64 (N, k)

    def rows(self, start: int, stop: int) -> Positions:
        return Positions(**{f.name: _rows(getattr(self, f.name), start, stop) for f in fields(self)})


def _rows(value: Any, start: int, stop: int) -> Any:
    return None if value is None else value[start:stop]


@dataclass
class TokenTerms:
    """Per position, float32 `(N,)`: `loss` and `drift` carry gradients, the rest are diagnostics."""

    loss: Tensor
    drift: Tensor  # D_roll's integrand; nan where the behaviour log-prob is missing
    kl: Tensor  # KL(pi_t || p) on the support; for `sampled` the estimate log pi - log p
    forward_kl: Tensor  # KL(p || pi_t) on the support; nan for `sampled`
    entropy: Tensor  # of pi_t


def token_terms(spec: LossSpec, positions: Positions, head: Tensor, teacher_head: Tensor | None) -> TokenTerms:
    """All terms of all positions. `head` (V, student width) and `teacher_head` (V', teacher width) are the unembeddings.

    Vocabularies that differ only in padding are cut to the smaller one, which renormalises both distributions.
    """
    vocab = head.shape[0] if teacher_head is None else min(head.shape[0], teacher_head.shape[0])
    head = head[:vocab]
    teacher_head = None if teacher_head is None else teacher_head[:vocab]
    count = positions.tokens.shape[0]
    chunk = max(1, spec.chunk_bytes // (4 * vocab))
    if count <= chunk:
        return TokenTerms(*_terms(spec, positions, head, teacher_head))
    parts = [
        checkpoint(_terms, spec, positions.rows(i, i + chunk), head, teacher_head, use_reentrant=False)
        for i in range(0, count, chunk)
    ]
    return TokenTerms(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _terms(spec: LossSpec, at: Positions, head: Tensor, teacher_head: Tensor | None) -> tuple[Tensor, ...]:
    logits = (at.student_hidden @ head.T).float()
    student = torch.log_softmax(logits / spec.temperature, -1)
    # pi_t as the sampler would sample from it now: D_roll and the policy gradient are about that distribution.
    acting = student if spec.sampling_temperature == spec.temperature else _at(logits, spec.sampling_temperature)
    acting_y = acting.gather(-1, at.tokens[:, None])[:, 0]
    drifts = _drift(spec, at, acting, acting_y)
    with torch.no_grad():
        entropy = -(student.exp() * student).sum(-1)
    if spec.support == "sampled":
        teacher_y = _teacher_logprob(at, teacher_head)
        loss = policy_gradient(acting_y, teacher_y, at.behaviour, spec.advantage, spec.importance)
        estimate = acting_y.detach() - teacher_y
        return loss, drifts, estimate, torch.full_like(estimate, torch.nan), entropy
    ours, theirs = _on_support(spec, at, student, teacher_head)
    loss = divergence(spec.kind, ours, theirs, spec.beta)
    with torch.no_grad():
        reverse = loss.detach() if spec.kind == "reverse_kl" else kl(ours, theirs)
        forward = loss.detach() if spec.kind == "forward_kl" else kl(theirs, ours)
    return loss, drifts, reverse, forward, entropy


def _at(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def _on_support(spec: LossSpec, at: Positions, student: Tensor, teacher_head: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probs of student and teacher over the same classes: the vocabulary, or the teacher's top-k and a tail."""
    if spec.support == "full":
        assert at.teacher_hidden is not None
        assert teacher_head is not None
        return student, _at((at.teacher_hidden.to(teacher_head.dtype) @ teacher_head.T).float(), spec.temperature)
    assert at.teacher_topk is not None
    assert at.teacher_topk_ids is not None
    return drift.with_tail(student.gather(-1, at.teacher_topk_ids)), drift.with_tail(at.teacher_topk)


def _teacher_logprob(at: Positions, teacher_head: Tensor | None) -> Tensor:
    if at.teacher_logprobs is not None:
        return at.teacher_logprobs
    assert at.teacher_hidden is not None
    assert teacher_head is not None
    logprobs = _at((at.teacher_hidden.to(teacher_head.dtype) @ teacher_head.T).float(), 1.0)
    return logprobs.gather(-1, at.tokens[:, None])[:, 0]


def _drift(spec: LossSpec, at: Positions, acting: Tensor, acting_y: Tensor) -> Tensor:
    if spec.drift == "sampled":
        return drift.sampled(acting_y, at.behaviour)
    assert at.behaviour_topk is not None
    if spec.drift == "exact":
        return drift.exact(acting, at.behaviour_topk[:, : acting.shape[-1]])
    assert at.behaviour_topk_ids is not None
    return drift.topk(acting.gather(-1, at.behaviour_topk_ids), at.behaviour_topk)
