"""From hidden states to the objective and its gradients, a chunk of positions at a time: never `[tokens, vocab]` at once.

    L = sum_i w_i share_i ( l_i + lambda D_roll_i )          l_i, D_roll_i: means over sample i's positions

Each chunk's logits, the student's and the teacher's, are made once. From them come losses, drifts and, in the same visit,
the gradients for hidden states and head: four matrix products a position, as many as plain PyTorch needs that keeps
all logits; a checkpointed loss needs six. The weight w_i depends on the drift of the *whole* sample, so chunks end with
samples where these are short; a sample longer than a chunk collects its head gradient apart until its weight is known.

What freshness needs, the log-probability of the sampled token or of the sampler's top-k under the student now, comes out
of the same logits: no second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fopd_cli.freshness import drift
from fopd_cli.losses.divergence import LossKind, divergence, kl, one_name, policy_gradient, ratio

Support = Literal["full", "topk", "sampled", "mc"]
DriftKind = Literal["exact", "topk", "sampled"]


@dataclass(frozen=True)
class LossSpec:
    """The recipe's loss, and the drift estimator that rides along."""

    kind: LossKind
    support: Support
    beta: float = 0.5  # of jsd
    temperature: float = 1.0  # of both distributions in the divergence (full support)
    advantage: Literal["cached", "recomputed"] = "recomputed"  # sampled support
    importance: bool = False  # sampled support
    max_ratio: float | None = None  # cap on the importance ratio; sampled and mc support
    drift: DriftKind = "sampled"
    sampling_temperature: float = 1.0  # at which the behaviour policy sampled, hence that of D_roll
    chunk_bytes: int = 64 << 20  # of one float32 [chunk, vocab] tensor


@dataclass
class Positions:
    """One row per response position (N of them), gathered from all samples of a micro-batch."""

    tokens: Tensor  # int64 (N,)
    behaviour: Tensor  # float32 (N,): log pi_r(y)
    behaviour_topk: Tensor | None = None  # float32 (N, k), or (N, V) for the exact drift
    behaviour_topk_ids: Tensor | None = None  # int64 (N, k)
    draw_ids: Tensor | None = None  # int64 (N, draws - 1)
    draw_behaviour: Tensor | None = None  # float32 (N, draws - 1): log pi_r of them
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
    """Per position, float32 `(N,)`, without gradients."""

    loss: Tensor
    drift: Tensor  # D_roll's integrand; nan where the behaviour log-prob is missing
    kl: Tensor  # KL(pi_t || p) on the support; for `sampled` the estimate log pi - log p
    forward_kl: Tensor  # KL(p || pi_t) on the support; nan for `sampled`
    entropy: Tensor  # of pi_t
    student_mass: Tensor  # probability that the student gives to the teacher's top-k; 1 on full, nan on sampled support
    teacher_mass: Tensor  # the same for the teacher
    clamped: Tensor  # share of the position's terms at a limit: of the ratio, of the drift, or a tail too small to tell from 0


@dataclass
class Weighting:
    """How positions add up. All tensors `(N,)`; positions of a sample stand together, samples in rising order.

    `loss` and `drift` are each position's coefficient in `share_i l_i` and `share_i lambda D_i`; `mean` is its share of D_i
    itself. `weigh(samples, drifts)` gives w_i of some samples (both `(n,)`) without gradient; None: all weights are 1.
    """

    sample: Tensor  # int64
    loss: Tensor
    drift: Tensor
    mean: Tensor
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None


def chunked_objective(
    spec: LossSpec, hidden: Tensor, at: Positions, head: Tensor, teacher_head: Tensor | None, weighting: Weighting
) -> tuple[Tensor, TokenTerms]:
    """L (a scalar with gradients for `hidden` and `head`) and the terms of all positions.

    `hidden` `(N, student width)` predicts `at.tokens`; `head` `(V, student width)` and `teacher_head` `(V', teacher width)` are the
    unembeddings. Vocabularies that differ only in padding are cut to the smaller one, which renormalises both.
    """
    vocab = head.shape[0] if teacher_head is None else min(head.shape[0], teacher_head.shape[0])
    head = _cut(head, vocab)
    teacher_head = None if teacher_head is None else _cut(teacher_head, vocab)
    learns = (torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and head.requires_grad)
    value, *terms = _Objective.apply(hidden, head, spec, at, teacher_head, weighting, learns)
    return value, TokenTerms(*terms)


def _cut(head: Tensor, vocab: int) -> Tensor:
    return head if head.shape[0] == vocab else head[:vocab]  # even a full slice costs a copy of its gradient


class _Objective(torch.autograd.Function):
    """The gradients are made in `forward`, while the logits are there; `backward` scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, spec: LossSpec, at: Positions, teacher_head: Tensor | None,
        weighting: Weighting, learns: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        pass_ = _Pass(spec, hidden, at, head, teacher_head, weighting, *learns)
        for group in _groups(weighting.sample, pass_.chunk):
            pass_.visit(group)
        narrow = None if pass_.head_gradient is None else pass_.head_gradient.to(head.dtype)
        ctx.save_for_backward(pass_.hidden_gradient, narrow)
        terms = tuple(torch.cat(column) for column in zip(*pass_.terms, strict=True))
        ctx.mark_non_differentiable(*terms)
        return (pass_.value, *terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        gradients = ctx.saved_tensors
        if float(upstream[0]) != 1:
            gradients = tuple(None if g is None else g * upstream[0] for g in gradients)
        return (*gradients, None, None, None, None, None)


def _groups(sample: Tensor, chunk: int) -> Iterator[list[tuple[int, int]]]:
    """Pieces (start, stop) of at most `chunk` positions: several whole samples as one piece, a long one as several."""
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


class _Pass:
    """One visit of all positions."""

    def __init__(
        self, spec: LossSpec, hidden: Tensor, at: Positions, head: Tensor, teacher_head: Tensor | None, weighting: Weighting,
        hidden_learns: bool, head_learns: bool,
    ) -> None:  # fmt: skip
        self.spec, self.hidden, self.at, self.head, self.teacher_head = spec, hidden, at, head, teacher_head
        self.weighting, self.learning = weighting, hidden_learns or head_learns
        self.chunk = max(1, spec.chunk_bytes // (4 * head.shape[0]))
        self.terms: list[tuple[Tensor, ...]] = []
        self.value = torch.zeros((), device=hidden.device)
        # One set of buffers for all chunks: on a CPU, fresh ones of this size would be mapped and zeroed by the kernel.
        rows = min(self.chunk, len(at.tokens))
        self._buffers = [torch.empty(rows, head.shape[0], device=hidden.device) for _ in range(3)]
        self.hidden_gradient = torch.empty_like(hidden) if hidden_learns else None
        # A frozen head (LoRA) costs neither the buffer nor the product.
        self.head_gradient = torch.zeros_like(head, dtype=torch.float32) if head_learns else None

    def visit(self, pieces: list[tuple[int, int]]) -> None:
        """Whole samples: weigh, then take gradients. Pieces of one sample: gradients of weight 1, then weigh."""
        w = self.weighting
        first, last = pieces[0][0], pieces[-1][1]
        if len(pieces) == 1:
            chunk = self._evaluate(first, last)
            self._accumulate(chunk, first, last, self._weights(chunk.terms[1], first, last), self.head_gradient)
            return
        if w.weigh is None:
            for start, stop in pieces:
                self._accumulate(self._evaluate(start, stop), start, stop, None, self.head_gradient)
            return
        own = None if self.head_gradient is None else torch.zeros_like(self.head_gradient)
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
            self.head_gradient += own.mul_(weight)

    def _weights(self, drifts: Tensor, start: int, stop: int) -> Tensor:
        """w_i of each position `(stop - start,)`."""
        w = self.weighting
        if w.weigh is None:
            return torch.ones_like(drifts)
        samples, inverse = torch.unique_consecutive(w.sample[start:stop], return_inverse=True)
        share = w.mean[start:stop]
        means = torch.zeros(len(samples), device=drifts.device).index_add(
            0, inverse, torch.where(share > 0, share * drifts, 0.0)
        )
        return w.weigh(samples, means)[inverse]

    def _evaluate(self, start: int, stop: int) -> _Chunk:
        at, hidden = self.at.rows(start, stop), self.hidden[start:stop]
        student, teacher, spare = (b[: stop - start] for b in self._buffers)
        _matmul(hidden, self.head, student)
        if self.teacher_head is not None and at.teacher_hidden is not None:
            _matmul(at.teacher_hidden.to(self.teacher_head.dtype), self.teacher_head, teacher)
        kind = _FullChunk if self.spec.support == "full" and self.spec.drift == "sampled" else _AnyChunk
        chunk: _Chunk = kind(self.spec, at, student, teacher, spare, self.learning)
        self.terms.append(chunk.terms)
        return chunk

    def _accumulate(self, chunk: _Chunk, start: int, stop: int, weights: Tensor | None, head: Tensor | None) -> None:
        w = self.weighting
        a, b = w.loss[start:stop], w.drift[start:stop]
        if weights is not None:
            a, b = a * weights, b * weights
        loss, drifts = chunk.terms[:2]
        self.value = self.value + (a * loss).sum() + torch.where(b != 0, b * drifts, 0.0).sum()
        if not self.learning:
            return
        hidden, narrow = self.hidden[start:stop], chunk.gradient(a, b).to(self.head.dtype)
        if self.hidden_gradient is not None:
            self.hidden_gradient[start:stop] = narrow @ self.head
        if head is None:
            return
        if head.dtype == hidden.dtype:
            head.addmm_(narrow.T, hidden)
        else:
            head += narrow.T @ hidden


def _matmul(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """Logits in float32."""
    if hidden.dtype == torch.float32 and head.dtype == torch.float32:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.T)


class _Chunk(Protocol):
    """Some positions: their terms, and then, given each one's coefficients, the gradient for their logits."""

    terms: tuple[Tensor, ...]  # in the order of `TokenTerms`

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        """d/dlogits of `sum(loss * l + drift * D)`, `(n, V)` float32, in a buffer that the next chunk reuses."""
        ...


class _FullChunk:
    """Full vocabulary and sampled drift, by formula and in place: the path that must be fast, and it is memory that bounds it.

    With z the logits over the temperature T: u = exp(z - max), pi = u / sum(u), likewise v and p of the teacher, and
    gap = log pi - log p = (z - z_teacher) + shift, one number `shift` a row. Then
        KL(pi||p) = sum(pi gap)       d/dz = pi (gap - KL)
        KL(p||pi) = -sum(p gap)       d/dz = pi - p
        JSD       = sum(beta p w + (1 - beta) pi (gap + w)),   w = log p/m = -log(beta + (1 - beta) e^gap)
                                      d/dz = pi (g - sum(pi g)),   g = (1 - beta)(gap + w)
    and dz / dlogits = 1 / T. The drift D = rho log rho - rho + 1 has dD/dlog pi(y) = rho log rho.
    """

    def __init__(
        self, spec: LossSpec, at: Positions, student: Tensor, teacher: Tensor, spare: Tensor, learning: bool
    ) -> None:
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
        log_rho = self.acting_y[:, 0] - at.behaviour
        drifts = drift.sampled(self.acting_y[:, 0], at.behaviour)
        slope = log_rho.clamp(max=drift.MAX_LOG_RHO).exp() * log_rho
        self.drift_slope = torch.where(log_rho < drift.MAX_LOG_RHO, slope, 0.0)
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
        """Leaves log pi/m in `gap`; past +-80 one of the two probabilities is nothing beside the other."""
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
        # Every kind is pi * (factor * x + constant), the forward KL less a p.
        if self.kind == "forward_kl":
            out = self.u.mul_((a + on_pi) / self.total).addcmul_(self.v, -a / self.teacher_total)
        else:
            if self.kind == "reverse_kl":
                factor, constant = a, a * (self.shift - self.reverse) + on_pi
            else:
                factor, constant = a * (1 - spec.beta), on_pi - a * self.reverse_of_mixture
            out = self.gap.mul_(factor / self.total).add_(constant / self.total).mul_(self.u)
        if acting is not None:
            out.add_(acting)
        return out.scatter_add_(-1, self.y, e)


def _lse_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row log-sum-exp, maximum and sum of exp(logits - maximum), which it leaves in place of the logits."""
    top = logits.amax(-1, keepdim=True)
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return top + total.log(), top, total


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row `(n, 1)`, without a product of full size."""
    return torch.bmm(left[:, None, :], right[:, :, None])[:, 0]


class _AnyChunk:
    """Every support and estimator, by autograd on the chunk's logits."""

    def __init__(
        self, spec: LossSpec, at: Positions, student: Tensor, teacher: Tensor, spare: Tensor, learning: bool
    ) -> None:
        with torch.set_grad_enabled(learning):
            self.logits = student.detach().requires_grad_(learning)
            self.live = _terms(spec, at, self.logits, teacher)
        self.terms: tuple[Tensor, ...] = tuple(term.detach() for term in self.live)

    def gradient(self, loss: Tensor, drift: Tensor) -> Tensor:
        with torch.enable_grad():
            total = (loss * self.live[0]).sum() + torch.where(drift != 0, drift * self.live[1], 0.0).sum()
            return torch.autograd.grad(total, self.logits)[0]


def _terms(spec: LossSpec, at: Positions, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, ...]:
    """The terms from logits, written for reading."""
    student = torch.log_softmax(logits / spec.temperature, -1)
    # pi_t as the sampler would sample from it now: D_roll and the policy gradient are about that distribution.
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
        teacher_y = _teacher_logprob(at, teacher_logits)
        if spec.importance:
            clamped = torch.maximum(clamped, _capped(spec, acting_y, at.behaviour))
        loss = policy_gradient(acting_y, teacher_y, at.behaviour, spec.advantage, spec.importance, spec.max_ratio)
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
    """The mean of the policy-gradient form over all draws of a position, each corrected by pi_t/pi_r; share of capped ones."""
    teacher = torch.log_softmax(teacher_logits, -1)
    ids, student, behaviour = at.tokens[:, None], acting_y[:, None], at.behaviour[:, None]
    if at.draw_ids is not None and at.draw_behaviour is not None:
        ids = torch.cat([ids, at.draw_ids], -1)
        student = torch.cat([student, acting.gather(-1, at.draw_ids)], -1)
        behaviour = torch.cat([behaviour, at.draw_behaviour], -1)
    judged = teacher.gather(-1, ids)
    loss = policy_gradient(student, judged, behaviour, spec.advantage, importance=True, max_ratio=spec.max_ratio)
    return loss.mean(-1), _capped(spec, student, behaviour).mean(-1)


def _capped(spec: LossSpec, student: Tensor, behaviour: Tensor) -> Tensor:
    """1 where the cap on the importance ratio is in force."""
    if spec.max_ratio is None:
        return torch.zeros_like(behaviour)
    return (ratio(student.detach(), behaviour, None) > spec.max_ratio).to(behaviour.dtype)


def _teacher_logprob(at: Positions, teacher_logits: Tensor) -> Tensor:
    if at.teacher_logprobs is not None:
        return at.teacher_logprobs
    return torch.log_softmax(teacher_logits, -1).gather(-1, at.tokens[:, None])[:, 0]


def _drift(spec: LossSpec, at: Positions, acting: Tensor, acting_y: Tensor) -> Tensor:
    if spec.drift == "sampled":
        return drift.sampled(acting_y, at.behaviour)
    assert at.behaviour_topk is not None
    if spec.drift == "exact":
        return drift.exact(acting, at.behaviour_topk[:, : acting.shape[-1]])
    assert at.behaviour_topk_ids is not None
    return drift.topk(acting.gather(-1, at.behaviour_topk_ids), at.behaviour_topk)
