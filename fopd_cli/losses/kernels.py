"""A chunk of positions: from its logits to its terms, and, once their coefficients are known, to the logits'
gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fopd_cli.freshness import drift
from fopd_cli.losses.divergence import one_name
from fopd_cli.losses.head import soft_cap, soft_cap_
from fopd_cli.losses.terms import LossSpec, Positions, terms_of
from fopd_cli.names import LossKind

Caps = tuple[float | None, float | None]  # soft caps of the student's and the teacher's logits


class Chunk(Protocol):
    """Some positions: their terms, and then, given each one's coefficients, the gradient for their logits."""

    terms: tuple[Tensor, ...]  # in the order of `TokenTerms`

    def __init__(
        self,
        spec: LossSpec,
        at: Positions,
        student: Tensor,
        teacher: Tensor,
        spare: Tensor | None,
        caps: Caps,
        learning: bool,
    ) -> None:
        """Takes logits `(n, V)` before their soft caps, which it may overwrite, and for some kernels a
        `spare` buffer of that shape.
        """

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        """d/dlogits of `sum(loss * l + drift * D)`, `(n, V)`, through the cap, in a buffer that the next
        chunk reuses.
        """
        ...


# Losses that `FullChunk` and `CompiledChunk` have formulas for. All others go through `AnyChunk`.
BY_HAND: frozenset[LossKind] = frozenset({"forward_kl", "reverse_kl", "jsd"})


def kernel(spec: LossSpec, cap: float | None) -> type[Chunk]:
    """The fastest one for this loss, with a student whose logits are soft-capped at `cap`."""
    if spec.support != "full" or spec.kind not in BY_HAND or spec.drift not in drift.SLOPES:
        return AnyChunk
    if spec.compile:
        return CompiledChunk
    return FullChunk if FullChunk.bears(spec, cap) else AnyChunk


SMALLEST_LOG = 80.0  # e^-80 is still a normal float32


class FullChunk:
    """Full vocabulary and one-token drift, by formula and in place: the path that must be fast, and is bound
    by memory.

    With z the logits over the temperature T: u = exp(z - max), pi = u / sum(u), likewise v and p for the
    teacher, and gap = log pi - log p = (z - z_teacher) + shift, one number `shift` per row. Then
        KL(pi||p) = sum(pi gap)       d/dz = pi (gap - KL)
        KL(p||pi) = -sum(p gap)       d/dz = pi - p
        JSD       = sum(beta p w + (1 - beta) pi (gap + w)),   w = log p/m = -log(beta + (1 - beta) e^gap)
                                      d/dz = pi (g - sum(pi g)),   g = (1 - beta)(gap + w)
    and dz / dlogits = 1 / T. The drift depends only on log pi(y): `drift.slope`. Under a soft cap logits =
    cap tanh(x / cap), and dlogits / dx = 1 - (logits / cap)^2, with logits = T (log u + max), so no buffer
    holds them.
    """

    def __init__(
        self,
        spec: LossSpec,
        at: Positions,
        student: Tensor,
        teacher: Tensor,
        spare: Tensor | None,
        caps: Caps,
        learning: bool,
    ) -> None:
        assert spare is not None
        soft_cap_(student, caps[0])
        soft_cap_(teacher, caps[1])
        self.cap = caps[0]
        self.spec, self.kind, self.y = spec, one_name(spec.kind, spec.beta), at.tokens[:, None]
        t, ts = spec.temperature, spec.sampling_temperature
        y_logit = student.gather(-1, self.y)
        self.acting_lse = _lse_(torch.div(student, ts, out=spare))[0] if ts != t else None
        if t != 1:
            student.div_(t)
            teacher.div_(t)
        lse, self.top, self.total = _lse_(spare.copy_(student))
        entropy = lse - _dot(spare, student) / self.total
        student.sub_(teacher)
        teacher_lse, _, self.teacher_total = _lse_(teacher)
        self.u, self.v, self.gap, self.shift = spare, teacher, student, teacher_lse - lse
        self.acting_y = y_logit / ts - (self.acting_lse if self.acting_lse is not None else lse)
        drifts = drift.ONE_TOKEN[spec.drift](self.acting_y[:, 0], at.behaviour)
        self.drift_slope = drift.slope(spec.drift, self.acting_y[:, 0], at.behaviour)
        self.reverse = _dot(self.u, self.gap) / self.total + self.shift
        forward = -(_dot(self.v, self.gap) / self.teacher_total + self.shift)
        loss = self.reverse if self.kind == "reverse_kl" else forward
        if self.kind == "jsd":
            loss = self._jsd()
        one = torch.ones_like(drifts)
        clamped = drift.at_limit(self.acting_y[:, 0], at.behaviour)
        columns = (loss[:, 0], drifts, self.reverse[:, 0], forward[:, 0], entropy[:, 0], one, one, clamped)
        self.terms: tuple[Tensor, ...] = columns

    def _jsd(self) -> Tensor:
        """Leaves log pi/m in `gap`; past +-80 one of the two probabilities is negligible."""
        beta = self.spec.beta
        gap = self.gap.add_(self.shift).clamp_(-80, 80)
        w = gap.exp().mul_(1 - beta).add_(beta).log_().neg_()
        self.reverse_of_mixture = (_dot(self.u, gap.add_(w)) / self.total).mul_(1 - beta)
        return beta * _dot(self.v, w) / self.teacher_total + self.reverse_of_mixture

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        spec = self.spec
        a = (loss / spec.temperature)[:, None]
        e = (torch.where(drift != 0, drift * self.drift_slope, 0.0) / spec.sampling_temperature)[:, None]
        acting = None
        if self.acting_lse is not None:  # pi at the sampling temperature, from z = log u + max
            z = self.u.log().add_(self.top).mul_(spec.temperature / spec.sampling_temperature)
            acting = z.sub_(self.acting_lse).exp_().mul_(-e)
        on_pi = -e if acting is None else torch.zeros_like(e)
        # Every kind is pi * (factor * x + constant), for the forward KL minus `a p`. One of `u` and `gap`
        # holds the result, the other is free.
        free = self.u
        if self.kind == "forward_kl":
            free = self.gap if self.cap is None else self.gap.copy_(self.u)
            out = self.u.mul_((a + on_pi) / self.total).addcmul_(self.v, -a / self.teacher_total)
        else:
            if self.kind == "reverse_kl":
                factor, constant = a, a * (self.shift - self.reverse) + on_pi
            else:
                factor, constant = a * (1 - spec.beta), on_pi - a * self.reverse_of_mixture
            out = self.gap.mul_(factor / self.total).add_(constant / self.total).mul_(self.u)
        if acting is not None:
            out.add_(acting)
        out.scatter_add_(-1, self.y, e)
        if self.cap is None:
            return out
        by_cap = free.log_().add_(self.top).mul_(spec.temperature / self.cap)
        return out.mul_(by_cap.square_().neg_().add_(1))

    @staticmethod
    def bears(spec: LossSpec, cap: float | None) -> bool:
        """Whether `u` can hold the student's capped logits: the smallest must not round to 0."""
        return cap is None or 2 * cap <= SMALLEST_LOG * spec.temperature


def _lse_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, maximum and sum of exp(logits - maximum) per row; the exps replace the logits."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return top + total.log(), top, total


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row-wise dot product `(n, 1)`, without a full-size product."""
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0]


class CompiledChunk:
    """The same terms and gradients from the plain formulas, fused by torch.compile. Logits are read in the
    dtype of their product, a few times for the terms and once for the gradient, which overwrites the
    student's.
    """

    def __init__(
        self,
        spec: LossSpec,
        at: Positions,
        student: Tensor,
        teacher: Tensor,
        spare: Tensor | None,
        caps: Caps,
        learning: bool,
    ) -> None:
        self.how = (
            one_name(spec.kind, spec.beta),
            spec.beta,
            spec.temperature,
            spec.sampling_temperature,
            caps,
        )
        self.logits, self.tokens = (student, teacher), at.tokens
        terms, self.row = _compiled(_formula_terms)(
            *self.logits, at.tokens, at.behaviour, spec.drift, *self.how
        )
        self.terms: tuple[Tensor, ...] = terms

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        found: Tensor = _compiled(_formula_gradient)(
            *self.logits, self.tokens, loss, drift, self.row, *self.how
        )
        return found


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _formula_terms(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    behaviour: Tensor,
    estimator: str,
    kind: LossKind,
    beta: float,
    t: float,
    ts: float,
    caps: Caps,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The terms, and what the gradient needs per row: log-sum-exps, the mean of its bracket, the drift's
    slope.
    """
    logits = soft_cap(student.float(), caps[0])
    z, z_teacher = logits / t, soft_cap(teacher.float(), caps[1]) / t
    lse, teacher_lse = z.logsumexp(-1, keepdim=True), z_teacher.logsumexp(-1, keepdim=True)
    log_pi, log_p = z - lse, z_teacher - teacher_lse
    pi, p, gap = log_pi.exp(), log_p.exp(), log_pi - log_p
    reverse, forward = (pi * gap).sum(-1, keepdim=True), -(p * gap).sum(-1, keepdim=True)
    entropy = -(pi * log_pi).sum(-1)
    acting_lse = lse if ts == t else (logits / ts).logsumexp(-1, keepdim=True)
    y_logit = soft_cap(student.gather(-1, tokens[:, None]).float(), caps[0])
    acting_y = (y_logit / ts - acting_lse)[:, 0]
    loss, mean = forward if kind == "forward_kl" else reverse, reverse
    if kind == "jsd":
        to_mixture, teachers = _to_mixture(gap, beta)
        mean = (1 - beta) * (pi * to_mixture).sum(-1, keepdim=True)
        loss = mean + beta * (p * teachers).sum(-1, keepdim=True)
    slope = drift.slope(estimator, acting_y, behaviour)
    one = torch.ones_like(slope)
    drifts, clamped = drift.ONE_TOKEN[estimator](acting_y, behaviour), drift.at_limit(acting_y, behaviour)
    terms = (loss[:, 0], drifts, reverse[:, 0], forward[:, 0], entropy, one, one, clamped)
    return terms, (lse, teacher_lse, acting_lse, mean, slope)


def _formula_gradient(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    loss: Tensor,
    drifts: Tensor,
    row: tuple[Tensor, ...],
    kind: LossKind,
    beta: float,
    t: float,
    ts: float,
    caps: Caps,
) -> Tensor:
    lse, teacher_lse, acting_lse, mean, slope = row
    logits = soft_cap(student.float(), caps[0])
    log_pi, log_p = logits / t - lse, soft_cap(teacher.float(), caps[1]) / t - teacher_lse
    a, e = (loss / t)[:, None], (torch.where(drifts != 0, drifts * slope, 0.0) / ts)[:, None]
    if kind == "forward_kl":
        out = a * (log_pi.exp() - log_p.exp())
    else:
        bracket = log_pi - log_p
        if kind == "jsd":
            bracket = (1 - beta) * _to_mixture(bracket, beta)[0]
        out = a * log_pi.exp() * (bracket - mean)
    taken = torch.arange(student.shape[-1], device=student.device)[None] == tokens[:, None]
    out = out + e * (taken.float() - (logits / ts - acting_lse).exp())
    if caps[0] is not None:
        out = out * (1 - (logits / caps[0]).square())
    return student.copy_(out)


def _to_mixture(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log pi/m and log p/m from log pi/p; past +-80 one of the two probabilities is negligible."""
    gap = gap.clamp(-80, 80)
    teachers = -(beta + (1 - beta) * gap.exp()).log()
    return gap + teachers, teachers


class AnyChunk:
    """Every support and estimator, by autograd on the chunk's logits."""

    def __init__(
        self,
        spec: LossSpec,
        at: Positions,
        student: Tensor,
        teacher: Tensor,
        spare: Tensor | None,
        caps: Caps,
        learning: bool,
    ) -> None:
        with torch.set_grad_enabled(learning):
            soft_cap_(teacher, caps[1])
            self.logits = student.detach().requires_grad_(learning)
            self.live = terms_of(spec, at, soft_cap(self.logits, caps[0]), teacher)
        self.terms: tuple[Tensor, ...] = tuple(term.detach() for term in self.live)

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        with torch.enable_grad():
            total = (loss * self.live[0]).sum() + torch.where(drift != 0, drift * self.live[1], 0.0).sum()
            return torch.autograd.grad(total, self.logits)[0]
