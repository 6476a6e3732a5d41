"""The loss at each position: settings, inputs and terms, and a readable version of all terms from logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

import torch
from torch import Tensor

from fopd_cli.freshness import drift
from fopd_cli.freshness.trust import spent
from fopd_cli.losses.divergence import advantage_of, divergence, kl, policy_gradient, ratio
from fopd_cli.names import Advantage, DriftKind, LossKind, Support
from fopd_cli.recipe import Loss

DEFAULT = Loss()


@dataclass(frozen=True)
class LossSpec:
    """The recipe's loss, resolved, and the drift estimator computed with it. The recipe's section explains
    its keys.
    """

    kind: LossKind
    support: Support
    beta: float = DEFAULT.beta
    temperature: float = DEFAULT.temperature
    advantage: Advantage = DEFAULT.advantage
    importance: bool = False
    max_ratio: float | None = DEFAULT.max_ratio
    trust: float | None = None  # width of the token's trust region in nats; sampled and mc support
    drift: DriftKind = "sampled"
    sampling_temperature: float = 1.0  # the behaviour policy's, and hence D_roll's
    teacher_temperature: float = 1.0  # for sampled and mc support, if the teacher's logits are available
    chunk_bytes: int | None = None  # of one float32 [chunk, vocab] tensor; None: see `chunked.chunk_rows`
    compile: bool = False  # full support and one-token drift: formulas fused by torch.compile

    @classmethod
    def of(cls, section: Loss, **resolved: Any) -> LossSpec:
        """The section's keys unchanged, except those in `resolved`."""
        own = {f.name: getattr(section, f.name) for f in fields(cls) if f.name in Loss.model_fields}
        return cls(**{**own, **resolved})


@dataclass(frozen=True)
class Source:
    """Where the learner finds an array of `Positions`: a field of a sample's rollout or of its targets."""

    of: Literal["rollout", "targets"]
    name: str
    dtype: torch.dtype | None = None  # to convert it to; None: its own


I64, F32 = torch.int64, torch.float32


@dataclass
class Positions:
    """One row per response position (N of them), gathered from all samples of a micro-batch."""

    tokens: Annotated[Tensor, Source("rollout", "response_ids", I64)]  # (N,)
    behaviour: Annotated[Tensor, Source("rollout", "logprobs", F32)]  # (N,): log pi_r(y)
    # (N, k), or (N, V) for the exact drift
    behaviour_topk: Annotated[Tensor | None, Source("rollout", "topk_logprobs", F32)] = None
    behaviour_topk_ids: Annotated[Tensor | None, Source("rollout", "topk_ids", I64)] = None  # (N, k)
    draw_ids: Annotated[Tensor | None, Source("rollout", "draw_ids", I64)] = None  # (N, draws - 1)
    # (N, draws - 1): their log pi_r
    draw_behaviour: Annotated[Tensor | None, Source("rollout", "draw_logprobs", F32)] = None
    teacher_hidden: Annotated[Tensor | None, Source("targets", "hidden")] = None  # (N, teacher width)
    teacher_logprobs: Annotated[Tensor | None, Source("targets", "logprobs", F32)] = None  # (N,): log p(y)
    teacher_topk: Annotated[Tensor | None, Source("targets", "topk_logprobs", F32)] = None  # (N, k)
    teacher_topk_ids: Annotated[Tensor | None, Source("targets", "topk_ids", I64)] = None  # (N, k)

    def rows(self, start: int, stop: int) -> Positions:
        return Positions(**{f.name: _rows(getattr(self, f.name), start, stop) for f in fields(self)})


def _rows(value: Any, start: int, stop: int) -> Any:
    return None if value is None else value[start:stop]


SOURCES: dict[str, Source] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Positions, include_extras=True).items()
}


@dataclass
class TokenTerms:
    """Per position, float32 `(N,)`, without gradients."""

    loss: Tensor
    drift: Tensor  # D_roll's integrand; nan where the behaviour log-prob is missing
    kl: Tensor  # KL(pi_t || p) on the support; for `sampled` the estimate log pi - log p
    forward_kl: Tensor  # KL(p || pi_t) on the support; nan for `sampled`
    entropy: Tensor  # of pi_t
    # probability that the student gives to the teacher's top-k; 1 on full, nan on sampled and mc support
    student_mass: Tensor
    teacher_mass: Tensor  # the same for the teacher
    # share of the position's terms at a limit: the ratio's, the trust region's, the drift's, or a tail too
    # small to tell from 0
    clamped: Tensor


def terms_of(spec: LossSpec, at: Positions, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, ...]:
    """The terms, in the order of `TokenTerms`, from both logits `(N, V)`; gradients flow to the student's."""
    student = torch.log_softmax(logits / spec.temperature, -1)
    # pi_t as the sampler would use it now: D_roll and the policy gradient refer to that distribution.
    acting = student
    if spec.sampling_temperature != spec.temperature:
        acting = torch.log_softmax(logits / spec.sampling_temperature, -1)
    acting_y = acting.gather(-1, at.tokens[:, None])[:, 0]
    drifts = _drift(spec, at, acting, acting_y)
    with torch.no_grad():
        entropy = -(student.exp() * student).sum(-1)
    nan = torch.full_like(entropy, torch.nan)
    clamped = drift.at_limit(acting_y.detach(), at.behaviour)
    if spec.support == "sampled":
        teacher_y = _teacher_logprob(spec, at, teacher_logits)
        clamped = torch.maximum(clamped, _limited(spec, spec.importance, acting_y, teacher_y, at.behaviour))
        loss = policy_gradient(
            acting_y, teacher_y, at.behaviour, spec.advantage, spec.importance, spec.max_ratio, spec.trust
        )
        return loss, drifts, acting_y.detach() - teacher_y, nan, entropy, nan, nan, clamped
    if spec.support == "mc":
        loss, capped = _monte_carlo(spec, at, acting, acting_y, teacher_logits)
        with torch.no_grad():
            theirs = torch.log_softmax(teacher_logits / spec.temperature, -1)
            both = kl(student, theirs), kl(theirs, student)
            return loss, drifts, *both, entropy, nan, nan, torch.maximum(clamped, capped)
    if spec.support == "full":
        ours, theirs = student, torch.log_softmax(teacher_logits / spec.temperature, -1)
        masses = (torch.ones_like(entropy), torch.ones_like(entropy))
    else:
        assert spec.support == "topk"
        assert at.teacher_topk is not None
        assert at.teacher_topk_ids is not None
        kept = student.gather(-1, at.teacher_topk_ids)
        ours, theirs = drift.with_tail(kept), drift.with_tail(at.teacher_topk)
        masses = (kept.detach().exp().sum(-1), at.teacher_topk.exp().sum(-1))
        clamped = torch.maximum(clamped, drift.tail_at_limit(kept.detach(), at.teacher_topk))
    loss = divergence(spec.kind, ours, theirs, spec.beta)
    with torch.no_grad():
        reverse = loss.detach() if spec.kind == "reverse_kl" else kl(ours, theirs)
        forward = loss.detach() if spec.kind == "forward_kl" else kl(theirs, ours)
    return loss, drifts, reverse, forward, entropy, *masses, clamped


def _monte_carlo(
    spec: LossSpec, at: Positions, acting: Tensor, acting_y: Tensor, teacher_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean policy-gradient loss over a position's draws, each corrected by pi_t/pi_r, and the share of
    draws at a limit.
    """
    teacher = torch.log_softmax(teacher_logits / spec.teacher_temperature, -1)
    ids, student, behaviour = at.tokens[:, None], acting_y[:, None], at.behaviour[:, None]
    if at.draw_ids is not None and at.draw_behaviour is not None:
        ids = torch.cat([ids, at.draw_ids], -1)
        student = torch.cat([student, acting.gather(-1, at.draw_ids)], -1)
        behaviour = torch.cat([behaviour, at.draw_behaviour], -1)
    judged = teacher.gather(-1, ids)
    loss = policy_gradient(student, judged, behaviour, spec.advantage, True, spec.max_ratio, spec.trust)
    return loss.mean(-1), _limited(spec, True, student, judged, behaviour).mean(-1)


def _limited(spec: LossSpec, importance: bool, student: Tensor, teacher: Tensor, behaviour: Tensor) -> Tensor:
    """1 where the cap on the importance ratio or the trust region is active."""
    student = student.detach()
    limited = torch.zeros_like(behaviour, dtype=torch.bool)
    if importance and spec.max_ratio is not None:
        limited = ratio(student, behaviour, None) > spec.max_ratio
    if spec.trust is not None:
        advantage = advantage_of(spec.advantage, student, teacher, behaviour)
        limited = limited | spent(advantage, student - behaviour, spec.trust)
    return limited.to(behaviour.dtype)


def _teacher_logprob(spec: LossSpec, at: Positions, teacher_logits: Tensor) -> Tensor:
    if at.teacher_logprobs is not None:
        return at.teacher_logprobs
    return torch.log_softmax(teacher_logits / spec.teacher_temperature, -1).gather(-1, at.tokens[:, None])[
        :, 0
    ]


def _drift(spec: LossSpec, at: Positions, acting: Tensor, acting_y: Tensor) -> Tensor:
    if spec.drift in drift.ONE_TOKEN:
        # Unknown log-probs stay out of the estimator: even weighted by 0, their gradient would be nan.
        unknown = at.behaviour.isnan()
        found = drift.ONE_TOKEN[spec.drift](acting_y, torch.where(unknown, acting_y.detach(), at.behaviour))
        return torch.where(unknown, torch.nan, found)
    assert at.behaviour_topk is not None
    if spec.drift == "exact":
        return drift.exact(acting, at.behaviour_topk[:, : acting.shape[-1]])
    assert spec.drift == "topk"
    assert at.behaviour_topk_ids is not None
    return drift.topk(acting.gather(-1, at.behaviour_topk_ids), at.behaviour_topk)
