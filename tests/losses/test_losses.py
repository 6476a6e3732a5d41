"""losses/ against float64 formulas, TRL's loss, and each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from fopd_cli.freshness import drift as estimators
from fopd_cli.losses.chunked import chunked_objective
from fopd_cli.losses.divergence import DIVERGENCES, divergence, policy_gradient
from fopd_cli.losses.head import Head
from fopd_cli.losses.objective import shares, weighting
from fopd_cli.losses.terms import LossSpec, Positions, TokenTerms
from fopd_cli.names import LossKind

F64 = torch.float64


def pair_of_logits(rows: int = 6, vocab: int = 17, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, rows, vocab, generator=generator, dtype=F64)).unbind()
    return student.requires_grad_(), teacher


def softmax(x: torch.Tensor) -> np.ndarray:
    e = np.exp(x.detach().numpy() - x.detach().numpy().max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]
)
def test_divergences_are_their_formulas(kind: str, beta: float) -> None:
    student, teacher = pair_of_logits()
    pi, p = softmax(student), softmax(teacher)
    m = beta * p + (1 - beta) * pi

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(-1)

    expected = {
        "forward_kl": kl(p, pi),
        "reverse_kl": kl(pi, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(pi, m),
    }
    found = divergence(kind, torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), beta)
    np.testing.assert_allclose(found.detach().numpy(), expected[kind], rtol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_same_values_and_gradients_as_trl(beta: float, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = pair_of_logits(seed=3)
    ours = divergence(
        "jsd",
        torch.log_softmax(student / temperature, -1),
        torch.log_softmax(teacher / temperature, -1),
        beta,
    ).sum()
    (our_gradient,) = torch.autograd.grad(ours, student)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=beta, temperature=temperature, reduction="sum"
    )
    (their_gradient,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # TRL rounds beta to float32
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_same_distributions_have_no_loss_and_no_gradient(kind: str) -> None:
    student, _ = pair_of_logits()
    loss = divergence(kind, torch.log_softmax(student, -1), torch.log_softmax(student.detach(), -1)).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_extreme_probabilities_stay_finite(kind: str) -> None:
    student = torch.tensor([[0.0, -70.0, -5.0]], requires_grad=True)
    teacher = torch.tensor([[-70.0, 0.0, -5.0]])
    loss = divergence(kind, torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("advantage", ["cached", "recomputed"])
def test_policy_gradient_on_policy_is_the_reverse_kl_gradient(advantage: str, importance: bool) -> None:
    """Summed over the vocabulary with pi's probabilities (an exact expectation), on policy: all four forms
    agree.
    """
    student, teacher = pair_of_logits(rows=1)
    logp, target = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    behaviour = logp.detach()
    (behaviour.exp() * policy_gradient(logp, target, behaviour, advantage, importance)).sum().backward()
    ours = student.grad.clone()
    student.grad = None
    divergence("reverse_kl", torch.log_softmax(student, -1), target).sum().backward()
    torch.testing.assert_close(ours, student.grad, rtol=1e-9, atol=1e-12)


def test_policy_gradient_off_policy() -> None:
    """Recomputed advantage and importance ratio: unbiased for the current policy even on another one's
    samples.
    """
    student, teacher = pair_of_logits(rows=1)
    behaviour = torch.log_softmax(pair_of_logits(rows=1, seed=9)[0].detach(), -1)
    target = torch.log_softmax(teacher, -1)

    def gradient(advantage: str, importance: bool) -> torch.Tensor:
        logp = torch.log_softmax(student, -1)
        loss = (behaviour.exp() * policy_gradient(logp, target, behaviour, advantage, importance)).sum()
        return torch.autograd.grad(loss, student)[0]

    (exact,) = torch.autograd.grad(
        divergence("reverse_kl", torch.log_softmax(student, -1), target).sum(), student
    )
    torch.testing.assert_close(gradient("recomputed", True), exact, rtol=1e-9, atol=1e-12)
    assert (gradient("recomputed", False) - exact).abs().max() > 1e-3
    assert (gradient("cached", True) - exact).abs().max() > 1e-3


def test_a_spent_token_has_no_gradient_and_counts_as_limited() -> None:
    """The student has moved by 0.5 towards the first signal, against the second, not enough for the third."""
    behaviour, teacher = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-0.1, -3.0, -0.1])
    student = torch.tensor([-0.5, -0.5, -0.9], requires_grad=True)
    policy_gradient(student, teacher, behaviour, "cached", importance=False, trust=0.2).sum().backward()
    assert student.grad.tolist() == pytest.approx([0.0, 2.0, -0.9])
    student.grad = None
    policy_gradient(student, teacher, behaviour, "cached", importance=False).sum().backward()
    assert student.grad.tolist() == pytest.approx([-0.9, 2.0, -0.9])


@pytest.mark.parametrize("support", ["sampled", "mc"])
def test_the_trust_region_reaches_the_learner(support: str) -> None:
    """A region that nothing leaves changes nothing; one of no width keeps only tokens that moved against
    their signal.
    """
    hidden, at, head, teacher_head = positions()
    if support == "sampled":
        teacher_head = None
    found = {
        w: terms_of(LossSpec("reverse_kl", support, trust=w), hidden, at, head, teacher_head)
        for w in (None, 1e9, 1e-6)
    }
    assert torch.equal(found[None].loss, found[1e9].loss)
    assert (found[1e-6].clamped > found[1e9].clamped).any()
    assert torch.equal(
        found[1e-6].loss[found[1e-6].clamped > 0], torch.zeros(int((found[1e-6].clamped > 0).sum()))
    )


# ---- chunked -----------------------------------------------------------------------------------------------


def positions(
    n: int = 23, widths: tuple[int, int] = (8, 12), vocab: int = 19
) -> tuple[torch.Tensor, Positions, torch.Tensor, torch.Tensor]:
    """Hidden states, positions, the student's head and the teacher's."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = torch.randint(vocab, (n,), generator=generator)
    behaviour = torch.log_softmax(normal(n, vocab), -1)
    top = behaviour.topk(5, -1)
    teacher_hidden, teacher_head = normal(n, widths[1]), normal(vocab, widths[1])
    teacher = torch.log_softmax(teacher_hidden @ teacher_head.T, -1)
    teacher_top = teacher.topk(4, -1)
    at = Positions(
        tokens=tokens,
        behaviour=behaviour.gather(-1, tokens[:, None])[:, 0],
        behaviour_topk=top.values,
        behaviour_topk_ids=top.indices,
        teacher_hidden=teacher_hidden,
        teacher_logprobs=teacher.gather(-1, tokens[:, None])[:, 0],
        teacher_topk=teacher_top.values,
        teacher_topk_ids=teacher_top.indices,
    )
    return normal(n, widths[0]).requires_grad_(), at, normal(vocab, widths[0]).requires_grad_(), teacher_head


LENGTHS = [4, 1, 9, 6, 3]  # of the samples that the 23 positions belong to
SHARES = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15])
ANCHOR = 0.3


def each_alone(n: int = 23) -> Any:
    """Every position a sample of its own, of share 1: the objective is then the sum of all terms."""
    ones = torch.ones(n)
    return weighting(torch.arange(n), ones.bool(), ones.bool(), ones, ANCHOR, None)


def terms_of(
    spec: LossSpec, hidden: torch.Tensor, at: Positions, head: torch.Tensor, teacher_head: torch.Tensor | None
) -> TokenTerms:
    return chunked_objective(spec, hidden, at, head, teacher_head, each_alone(len(at.tokens)))[1]


def halving(samples: torch.Tensor, drifts: torch.Tensor) -> torch.Tensor:
    """Some weight that depends on the whole sample's drift."""
    return torch.exp(-drifts) / (samples + 1)


# From log rho of the sampled token.
DRIFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sampled": lambda log_rho: log_rho.exp() * log_rho - log_rho.exp() + 1,
    "quadratic": lambda log_rho: log_rho**2 / 2,
}


def reference(
    spec: LossSpec,
    hidden: torch.Tensor,
    at: Positions,
    head: torch.Tensor,
    teacher_head: torch.Tensor,
    weighed: bool,
    mask: torch.Tensor,
) -> list[torch.Tensor]:
    """The objective and its gradients in float64, from the formulas, all logits at once, by autograd."""
    h, w = hidden.detach().to(F64).requires_grad_(), head.detach().to(F64).requires_grad_()
    logits = h @ w.T
    s, acting = (torch.log_softmax(logits / t, -1) for t in (spec.temperature, spec.sampling_temperature))
    t = torch.log_softmax(at.teacher_hidden.to(F64) @ teacher_head.to(F64).T / spec.temperature, -1)
    y = at.tokens[:, None]
    if spec.support == "full":
        loss = divergence(spec.kind, s, t, spec.beta)
    elif spec.support == "topk":
        kept, theirs = s.gather(-1, at.teacher_topk_ids).exp(), at.teacher_topk.to(F64).exp()
        ours, theirs = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log() for p in (kept, theirs))
        loss = divergence(spec.kind, ours, theirs, spec.beta)
    else:
        advantage = at.teacher_logprobs.to(F64) - acting.gather(-1, y)[:, 0].detach()
        loss = -advantage * acting.gather(-1, y)[:, 0]
    if spec.drift in DRIFTS:
        drift = DRIFTS[spec.drift](acting.gather(-1, y)[:, 0] - at.behaviour.to(F64))
    else:
        new, old = acting.gather(-1, at.behaviour_topk_ids).exp(), at.behaviour_topk.to(F64).exp()
        new, old = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (new, old))
        drift = (new * (new / old).log()).sum(-1)
    value = torch.zeros((), dtype=F64)
    start = 0
    for i, n in enumerate(LENGTHS):
        rows = slice(start, start + n)
        kept = mask[rows].to(F64)
        count = kept.sum().clamp(min=1)
        l_i, d_i = (kept * loss[rows]).sum() / count, (kept * drift[rows]).sum() / count
        weight = halving(torch.tensor(i), d_i.detach()) if weighed else 1.0
        value = value + SHARES[i] * weight * (l_i + ANCHOR * d_i)
        start += n
    return [value, *torch.autograd.grad(value, [h, w])]


CASES = [
    *(
        (kind, "full", "sampled", t, ts)
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for t, ts in ((1.0, 1.0), (0.7, 1.3))
    ),
    ("reverse_kl", "full", "quadratic", 0.7, 1.3),
    ("forward_kl", "topk", "quadratic", 1.0, 0.8),
    ("reverse_kl", "sampled", "quadratic", 1.0, 1.0),
    *(
        (kind, "topk", drift, 1.0, 0.8)
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for drift in ("sampled", "topk")
    ),
    ("reverse_kl", "sampled", "sampled", 1.0, 1.0),
    ("reverse_kl", "full", "topk", 0.9, 0.9),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "support", "drift", "temperature", "sampling"), CASES[:7])
def test_the_compiled_objective_and_its_gradients(
    kind: str, support: str, drift: str, temperature: float, sampling: float
) -> None:
    for chunk in (7, 1000):
        check_objective(kind, support, drift, temperature, sampling, True, chunk, compile=True)


@pytest.mark.parametrize("chunk", [1, 5, 7, 1000])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("kind", "support", "drift", "temperature", "sampling"), CASES)
def test_the_objective_and_its_gradients(
    kind: str, support: str, drift: str, temperature: float, sampling: float, weighed: bool, chunk: int
) -> None:
    check_objective(kind, support, drift, temperature, sampling, weighed, chunk)


def check_objective(
    kind: str,
    support: str,
    drift: str,
    temperature: float,
    sampling: float,
    weighed: bool,
    chunk: int,
    **how: Any,
) -> None:
    """Whatever the chunks: samples shorter and longer than one, weights that need the whole sample, masked
    positions.
    """
    hidden, at, head, teacher_head = positions()
    spec = LossSpec(
        kind=kind,
        support=support,
        drift=drift,
        beta=0.3,
        temperature=temperature,
        sampling_temperature=sampling,
        chunk_bytes=4 * 19 * chunk,
        **how,
    )
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    mask = torch.ones(23, dtype=torch.bool)
    mask[[4, 7, 12, 20, 21, 22]] = False  # sample 1 and sample 4 have nothing left
    behaviour = at.behaviour.clone()
    behaviour[7] = torch.nan  # no log-prob where nothing was sampled
    at = replace(at, behaviour=behaviour)
    coefficients = weighting(sample, mask, mask, SHARES, ANCHOR, halving if weighed else None)
    value, _ = chunked_objective(spec, hidden, at, head, teacher_head, coefficients)
    found = [value, *torch.autograd.grad(value, [hidden, head])]
    whole = replace(at, behaviour=torch.nan_to_num(behaviour, nan=-1.0))
    for ours, theirs in zip(
        found, reference(spec, hidden, whole, head, teacher_head, weighed, mask), strict=True
    ):
        torch.testing.assert_close(ours.to(F64), theirs, rtol=2e-4, atol=2e-6)


def chi_squared(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """A divergence that nobody has a kernel for: sum of (p - pi)^2 / (beta p + (1 - beta) pi)."""
    p, pi = teacher.exp(), student.exp()
    return ((p - pi).square() / (beta * p + (1 - beta) * pi)).sum(-1)


@pytest.mark.parametrize("support", ["full", "topk"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_new_divergence_needs_no_more_than_its_formula(
    monkeypatch: pytest.MonkeyPatch, support: str, compiled: bool
) -> None:
    """Whatever has formulas by hand must not take it for one of its own."""
    monkeypatch.setitem(DIVERGENCES, "chi_squared", chi_squared)  # type: ignore[misc]
    for drift in ("sampled", "topk"):
        check_objective("chi_squared", support, drift, 0.9, 1.0, True, 7, compile=compiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_new_estimator_of_drift_needs_no_more_than_its_formula(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Beside a loss that has a derivative by hand it has none."""
    monkeypatch.setitem(estimators.ONE_TOKEN, "cosh", lambda new, old: torch.cosh(new - old) - 1)
    monkeypatch.setitem(DRIFTS, "cosh", lambda log_rho: torch.cosh(log_rho) - 1)
    check_objective("forward_kl", "full", "cosh", 0.9, 1.1, True, 7, compile=compiled)


def test_every_name_of_a_loss_has_a_formula() -> None:
    assert set(get_args(LossKind)) == set(DIVERGENCES)


@pytest.mark.parametrize("support", ["full", "topk", "sampled"])
def test_upstream_gradients_scale(support: str) -> None:
    hidden, at, head, teacher_head = positions()
    value, _ = chunked_objective(
        LossSpec("reverse_kl", support), hidden, at, head, teacher_head, each_alone()
    )
    once = torch.autograd.grad(value, [hidden, head], retain_graph=True)
    thrice = torch.autograd.grad(3 * value, [hidden, head])
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_changes_no_other_gradient(frozen: str, chunk: int) -> None:
    hidden, at, head, teacher_head = positions()
    spec = LossSpec("reverse_kl", "full", chunk_bytes=4 * 19 * chunk)
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    mask = torch.ones(23, dtype=torch.bool)
    coefficients = weighting(sample, mask, mask, SHARES, ANCHOR, halving)
    value, _ = chunked_objective(spec, hidden, at, head, teacher_head, coefficients)
    learning, still = (hidden, head) if frozen == "head" else (head, hidden)
    (expected,) = torch.autograd.grad(value, [learning])
    still.requires_grad_(False)
    again, _ = chunked_objective(spec, hidden, at, head, teacher_head, coefficients)
    again.backward()
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(learning.grad, expected)
    assert still.grad is None


def test_nothing_is_learnt_without_gradients() -> None:
    hidden, at, head, teacher_head = positions()
    spec = LossSpec("reverse_kl", "full")
    _, learning = chunked_objective(spec, hidden, at, head, teacher_head, each_alone())
    with torch.no_grad():
        value, measured = chunked_objective(spec, hidden, at, head, teacher_head, each_alone())
    assert not value.requires_grad
    torch.testing.assert_close(measured.loss, learning.loss)
    assert torch.isfinite(measured.forward_kl).all()  # only measured, for it costs a pass


def test_an_empty_mask_is_a_loss_of_zero() -> None:
    hidden, at, head, teacher_head = positions()
    nothing = torch.zeros(23, dtype=torch.bool)
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    for weigh in (None, halving):
        coefficients = weighting(sample, nothing, nothing, SHARES, ANCHOR, weigh)
        value, _ = chunked_objective(
            LossSpec("reverse_kl", "full"), hidden, at, head, teacher_head, coefficients
        )
        assert value.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(value, [hidden, head]))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("support", ["full", "topk"])
def test_probabilities_down_to_1e_30_are_no_nan(kind: str, support: str) -> None:
    """Student and teacher each certain of another token, and of one that the sampler would hardly ever have
    drawn.
    """
    logits = torch.full((4, 19), -69.0)
    logits[range(4), range(4)] = 0.0
    hidden, head = logits.clone().requires_grad_(), torch.eye(19, requires_grad=True)
    teacher = logits.roll(5, -1)
    top = torch.log_softmax(teacher, -1).topk(3, -1)
    at = Positions(
        tokens=torch.tensor([9, 9, 0, 1]),
        behaviour=torch.tensor([-0.1, -69.0, -69.0, 0.0]),
        teacher_hidden=teacher,
        teacher_topk=top.values,
        teacher_topk_ids=top.indices,
    )
    value, terms = chunked_objective(LossSpec(kind, support), hidden, at, head, torch.eye(19), each_alone(4))
    gradients = torch.autograd.grad(value, [hidden, head])
    assert torch.isfinite(value)
    assert torch.isfinite(terms.loss).all()
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_bf16_gradients_are_within_its_noise(kind: str) -> None:
    """Hidden states and heads in bf16, sums in fp32: as far from float64 as rounding the inputs alone."""
    hidden, at, head, teacher_head = positions(widths=(64, 64))
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    at = replace(at, teacher_hidden=at.teacher_hidden.bfloat16())
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    mask = torch.ones(23, dtype=torch.bool)
    spec = LossSpec(kind, "full", beta=0.3, chunk_bytes=4 * 19 * 5)
    teacher_low = teacher_head.bfloat16()
    value, _ = chunked_objective(
        spec, low[0], at, low[1], teacher_low, weighting(sample, mask, mask, SHARES, ANCHOR, None)
    )
    found = torch.autograd.grad(value, low)
    expected = reference(spec, low[0].float(), at, low[1].float(), teacher_low.float(), False, mask)
    for ours, theirs in zip(found, expected[1:], strict=True):
        assert (ours.to(F64) - theirs).norm() < 2e-2 * theirs.norm()


def test_mass_on_the_support_is_reported() -> None:
    hidden, at, head, teacher_head = positions()
    terms = terms_of(LossSpec("reverse_kl", "topk"), hidden, at, head, None)
    pi = softmax(hidden.double() @ head.double().T)
    expected = np.take_along_axis(pi, at.teacher_topk_ids.numpy(), -1).sum(-1)
    np.testing.assert_allclose(terms.student_mass.numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(terms.teacher_mass.numpy(), at.teacher_topk.exp().sum(-1).numpy(), rtol=1e-6)
    assert (terms_of(LossSpec("reverse_kl", "full"), hidden, at, head, teacher_head).student_mass == 1).all()


def test_terms_are_those_of_the_logits() -> None:
    hidden, at, head, teacher_head = positions()
    terms = terms_of(LossSpec("reverse_kl", "full", temperature=0.7), hidden, at, head, teacher_head)
    pi = softmax(hidden.double() @ head.double().T / 0.7)
    p = softmax(at.teacher_hidden.double() @ teacher_head.double().T / 0.7)
    np.testing.assert_allclose(terms.loss.numpy(), (pi * np.log(pi / p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(terms.entropy.numpy(), -(pi * np.log(pi)).sum(-1), rtol=1e-4)


def test_topk_loss_nears_the_full_one_as_k_grows() -> None:
    hidden, at, head, teacher_head = positions()
    full = terms_of(LossSpec("reverse_kl", "full"), hidden, at, head, teacher_head).loss.mean().item()
    teacher = torch.log_softmax(at.teacher_hidden @ teacher_head.T, -1)
    found = []
    for k in (2, 8, 18):
        top = teacher.topk(k, -1)
        some = replace(at, teacher_topk=top.values, teacher_topk_ids=top.indices)
        found.append(terms_of(LossSpec("reverse_kl", "topk"), hidden, some, head, None).loss.mean().item())
    assert found[0] < found[1] < found[2] <= full + 1e-5
    assert found[2] == pytest.approx(full, rel=1e-3)


def test_vocabularies_that_differ_in_padding() -> None:
    """The larger vocabulary is cut and renormalised."""
    hidden, at, head, teacher_head = positions()
    padded = torch.cat([teacher_head, torch.full((3, teacher_head.shape[1]), 7.0)])
    spec = LossSpec("forward_kl", "full")
    ours = terms_of(spec, hidden, at, head, padded).loss
    torch.testing.assert_close(ours, terms_of(spec, hidden, at, head, teacher_head).loss)


def test_a_teacher_that_is_off_by_one_position_is_noticed() -> None:
    _, at, _, teacher_head = positions()
    same = at.teacher_hidden.clone().requires_grad_()
    spec = LossSpec("reverse_kl", "full")
    assert terms_of(spec, same, at, teacher_head, teacher_head).loss.abs().max() < 1e-6
    shifted = replace(at, teacher_hidden=at.teacher_hidden.roll(1, 0))
    assert terms_of(spec, same, shifted, teacher_head, teacher_head).loss.mean() > 0.5


def test_shares_are_by_sample_or_token() -> None:
    lengths = torch.tensor([1.0, 3.0])
    assert shares(lengths, "sample", samples=4, tokens=99).tolist() == [0.25, 0.25]
    assert shares(lengths, "token", samples=99, tokens=8).tolist() == [0.125, 0.375]


# ---- heads that do more than multiply ----------------------------------------------------------------------


def altered(cap: float | None, teacher_cap: float | None) -> tuple[Head, Head, torch.Tensor, Positions]:
    """A student's and a teacher's head with bias, scale and cap, hidden states, and positions for every
    support.
    """
    hidden, at, weight, teacher_weight = positions()
    generator = torch.Generator().manual_seed(7)
    student = Head(weight, torch.randn(19, generator=generator).requires_grad_(), 1.7, cap)
    teacher = Head(teacher_weight, torch.randn(19, generator=generator), 0.6, teacher_cap)
    everything = torch.log_softmax(torch.randn(23, 19, generator=generator), -1)
    return (
        student,
        teacher,
        hidden,
        replace(with_draws(at, everything, 3), teacher_logprobs=at.teacher_logprobs),
    )


def plain_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    u = head.scale * (hidden @ head.weight.T + head.bias)
    return u if head.cap is None else head.cap * torch.tanh(u / head.cap)


SUPPORTS = [
    *(
        (kind, "full", drift)
        for kind in ("reverse_kl", "forward_kl", "jsd")
        for drift in ("sampled", "quadratic", "topk")
    ),
    ("reverse_kl", "topk", "sampled"),
    ("jsd", "topk", "topk"),
    ("reverse_kl", "sampled", "sampled"),
    ("reverse_kl", "mc", "quadratic"),
]


def check_altered(
    kind: str, support: str, drift: str, caps: tuple[float | None, float | None], **how: Any
) -> None:
    """As if the logits were the hidden states and the head the identity, with autograd through the rest: the
    plain path, which float64 references check above, and the chain rule.
    """
    student, teacher, hidden, at = altered(*caps)
    spec = LossSpec(
        kind,
        support,
        beta=0.3,
        drift=drift,
        temperature=0.7,
        sampling_temperature=1.3,
        chunk_bytes=4 * 19 * 7,
        **how,
    )
    sample = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    mask = torch.ones(23, dtype=torch.bool)
    coefficients = weighting(sample, mask, mask, SHARES, ANCHOR, halving)
    value, terms = chunked_objective(spec, hidden, at, student, teacher, coefficients)
    learnt = [hidden, student.weight, student.bias]
    found = torch.autograd.grad(value, learnt)
    judged = replace(at, teacher_hidden=plain_logits(teacher, at.teacher_hidden))
    plain = replace(spec, compile=False)
    one = torch.eye(19)
    expected, same = chunked_objective(plain, plain_logits(student, hidden), judged, one, one, coefficients)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for f in fields(TokenTerms):
        torch.testing.assert_close(
            getattr(terms, f.name), getattr(same, f.name), rtol=1e-3, atol=1e-4, equal_nan=True, msg=f.name
        )
    for ours, theirs in zip(found, torch.autograd.grad(expected, learnt), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("caps", [(2.5, 3.0), (None, 3.0), (None, None), (40.0, 3.0)])
@pytest.mark.parametrize(("kind", "support", "drift"), SUPPORTS)
def test_biases_scales_and_caps(
    kind: str, support: str, drift: str, caps: tuple[float | None, float | None]
) -> None:
    """The last caps are too wide for their temperature to be recovered from probabilities."""
    check_altered(kind, support, drift, caps)


@pytest.mark.slow
@pytest.mark.parametrize("caps", [(2.5, 3.0), (None, None)])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_biases_scales_and_caps_compiled(kind: str, caps: tuple[float | None, float | None]) -> None:
    check_altered(kind, "full", "sampled", caps, compile=True)


# ---- several draws -----------------------------------------------------------------------------------------


def with_draws(at: Positions, behaviour: torch.Tensor, draws: int, seed: int = 0) -> Positions:
    """All draws from `behaviour` (N, V) log-probs, the first one in place of the tokens."""
    drawn = torch.multinomial(
        behaviour.exp(), draws, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    logprobs = behaviour.gather(-1, drawn)
    some = replace(at, tokens=drawn[:, 0], behaviour=logprobs[:, 0])
    return replace(some, draw_ids=drawn[:, 1:], draw_behaviour=logprobs[:, 1:]) if draws > 1 else some


def gradients_of(
    spec: LossSpec, hidden: torch.Tensor, at: Positions, head: torch.Tensor, teacher: torch.Tensor
) -> torch.Tensor:
    ones = torch.ones(len(at.tokens))
    alone = weighting(torch.arange(len(ones)), ones.bool(), ones.bool(), ones, 0.0, None)
    return torch.autograd.grad(chunked_objective(spec, hidden, at, head, teacher, alone)[0], hidden)[0]


def test_one_draw_is_the_sampled_form() -> None:
    hidden, at, head, teacher_head = positions()
    behaviour = torch.log_softmax(torch.randn(23, 19, generator=torch.Generator().manual_seed(3)), -1)
    one = with_draws(at, behaviour, 1)
    teacher = torch.log_softmax(at.teacher_hidden @ teacher_head.T, -1).gather(-1, one.tokens[:, None])[:, 0]
    sampled = LossSpec("reverse_kl", "sampled", importance=True)
    ours = gradients_of(LossSpec("reverse_kl", "mc"), hidden, one, head, teacher_head)
    theirs = gradients_of(sampled, hidden, replace(one, teacher_logprobs=teacher), head, teacher_head)
    torch.testing.assert_close(ours, theirs)


def test_many_draws_near_the_full_gradient() -> None:
    """Off policy: the error falls as one over the root of the number of draws, to the exact gradient of the
    reverse KL.
    """
    hidden, at, head, teacher_head = positions()
    now = torch.log_softmax(hidden.detach() @ head.detach().T, -1)
    behaviour = torch.log_softmax(
        now + 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(4)), -1
    )
    exact = gradients_of(LossSpec("reverse_kl", "full"), hidden, at, head, teacher_head)
    errors = []
    for draws in (16, 256, 4096):
        found = [
            gradients_of(
                LossSpec("reverse_kl", "mc"),
                hidden,
                with_draws(at, behaviour, draws, seed),
                head,
                teacher_head,
            )
            for seed in range(3)
        ]
        errors.append(float(np.mean([(g - exact).norm() / exact.norm() for g in found])))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]
    assert errors[2] < 0.1


@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("advantage", ["cached", "recomputed"])
@pytest.mark.parametrize("draws", [1, 5])
def test_draws_and_the_capped_ratio_against_float64(draws: int, advantage: str, cap: float | None) -> None:
    """-(mean over draws) min(rho, cap) (log p - log pi) log pi_t(y), from the formula; the share of capped
    ones as well.
    """
    hidden, at, head, teacher_head = positions()
    now = torch.log_softmax(hidden.detach() @ head.detach().T, -1)
    behaviour = torch.log_softmax(
        now + 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(4)), -1
    )
    some = with_draws(at, behaviour, draws)
    h, w = hidden.detach().to(F64).requires_grad_(), head.detach().to(F64).requires_grad_()
    ids = (
        some.tokens[:, None]
        if some.draw_ids is None
        else torch.cat([some.tokens[:, None], some.draw_ids], -1)
    )
    pi = torch.log_softmax(h @ w.T, -1).gather(-1, ids)
    p = torch.log_softmax(at.teacher_hidden.to(F64) @ teacher_head.to(F64).T, -1).gather(-1, ids)
    old = behaviour.to(F64).gather(-1, ids)
    rho = (pi - old).exp().detach()
    signal = (p - (old if advantage == "cached" else pi)).detach() * (
        rho if cap is None else rho.clamp(max=cap)
    )
    value = -(signal * pi).mean(-1).sum()
    spec = LossSpec("reverse_kl", "mc", advantage=advantage, max_ratio=cap, chunk_bytes=4 * 19 * 7)
    ones = torch.ones(23)
    alone = weighting(torch.arange(23), ones.bool(), ones.bool(), ones, 0.0, None)
    found, terms = chunked_objective(spec, hidden, some, head, teacher_head, alone)
    torch.testing.assert_close(found.to(F64), value, rtol=1e-4, atol=1e-5)
    pairs = zip(torch.autograd.grad(found, [hidden, head]), torch.autograd.grad(value, [h, w]), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.to(F64), theirs, rtol=2e-4, atol=2e-5)
    expected = torch.zeros(()) if cap is None else (rho > cap).to(F64).mean()
    assert float(terms.clamped.mean()) == pytest.approx(float(expected), abs=1e-6)
    assert cap is None or 0 < float(expected) < 1


def test_tails_and_drifts_at_their_limits_are_counted() -> None:
    hidden, at, head, teacher_head = positions()
    assert terms_of(LossSpec("reverse_kl", "topk"), hidden, at, head, teacher_head).clamped.sum() == 0
    certain = at.teacher_topk.clone()
    certain[3], certain[4] = (
        torch.tensor([0.0, -60.0, -60.0, -60.0]),
        torch.tensor([-0.7, -0.7, -30.0, -30.0]),
    )
    some = replace(at, teacher_topk=certain)
    found = terms_of(LossSpec("reverse_kl", "topk"), hidden, some, head, teacher_head).clamped
    assert found.nonzero().flatten().tolist() == [3]
    unlikely = at.behaviour.clone()
    unlikely[7] = -100.0
    for spec in (LossSpec("reverse_kl", "full"), LossSpec("reverse_kl", "topk")):
        found = terms_of(spec, hidden, replace(at, behaviour=unlikely), head, teacher_head).clamped
        assert found.nonzero().flatten().tolist() == [7]
