"""losses/ against float64 formulas, TRL's loss, and each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fopd_cli.losses.chunked import LossSpec, Positions, token_terms
from fopd_cli.losses.divergence import divergence, policy_gradient
from fopd_cli.losses.objective import objective

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

    expected = {"forward_kl": kl(p, pi), "reverse_kl": kl(pi, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(pi, m)}
    found = divergence(kind, torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), beta)
    np.testing.assert_allclose(found.detach().numpy(), expected[kind], rtol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_same_values_and_gradients_as_trl(beta: float, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = pair_of_logits(seed=3)
    ours = divergence(
        "jsd", torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1), beta
    ).sum()
    (our_gradient,) = torch.autograd.grad(ours, student)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="sum")
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
    """Summed over the vocabulary with pi's probabilities (an exact expectation), on policy: all four forms agree."""
    student, teacher = pair_of_logits(rows=1)
    logp, target = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    behaviour = logp.detach()
    (behaviour.exp() * policy_gradient(logp, target, behaviour, advantage, importance)).sum().backward()
    ours = student.grad.clone()
    student.grad = None
    divergence("reverse_kl", torch.log_softmax(student, -1), target).sum().backward()
    torch.testing.assert_close(ours, student.grad, rtol=1e-9, atol=1e-12)


def test_policy_gradient_off_policy() -> None:
    """Recomputed advantage and importance ratio: unbiased for the current policy even on another one's samples."""
    student, teacher = pair_of_logits(rows=1)
    behaviour = torch.log_softmax(pair_of_logits(rows=1, seed=9)[0].detach(), -1)
    target = torch.log_softmax(teacher, -1)

    def gradient(advantage: str, importance: bool) -> torch.Tensor:
        logp = torch.log_softmax(student, -1)
        loss = (behaviour.exp() * policy_gradient(logp, target, behaviour, advantage, importance)).sum()
        return torch.autograd.grad(loss, student)[0]

    (exact,) = torch.autograd.grad(divergence("reverse_kl", torch.log_softmax(student, -1), target).sum(), student)
    torch.testing.assert_close(gradient("recomputed", True), exact, rtol=1e-9, atol=1e-12)
    assert (gradient("recomputed", False) - exact).abs().max() > 1e-3
    assert (gradient("cached", True) - exact).abs().max() > 1e-3


# ---- chunked ----------------------------------------------------------------------------------------------------------


def positions(
    n: int = 23, widths: tuple[int, int] = (8, 12), vocab: int = 19
) -> tuple[Positions, torch.Tensor, torch.Tensor]:
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
        student_hidden=normal(n, widths[0]).requires_grad_(),
        tokens=tokens,
        behaviour=behaviour.gather(-1, tokens[:, None])[:, 0],
        behaviour_topk=top.values,
        behaviour_topk_ids=top.indices,
        teacher_hidden=teacher_hidden,
        teacher_logprobs=teacher.gather(-1, tokens[:, None])[:, 0],
        teacher_topk=teacher_top.values,
        teacher_topk_ids=teacher_top.indices,
    )
    return at, normal(vocab, widths[0]).requires_grad_(), teacher_head


@pytest.mark.parametrize("drift", ["sampled", "topk"])
@pytest.mark.parametrize("support", ["full", "topk", "sampled"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_chunks_change_nothing(kind: str, support: str, drift: str) -> None:
    at, head, teacher_head = positions()
    spec = LossSpec(kind=kind, support=support, drift=drift, temperature=1.0, sampling_temperature=0.8)
    whole = run_terms(spec, at, head, teacher_head)
    chunked = run_terms(replace(spec, chunk_bytes=4 * 19 * 5), at, head, teacher_head)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def run_terms(spec: LossSpec, at: Positions, head: torch.Tensor, teacher_head: torch.Tensor) -> list[torch.Tensor]:
    terms = token_terms(spec, at, head, teacher_head)
    gradients = torch.autograd.grad((terms.loss + 0.3 * terms.drift).sum(), [at.student_hidden, head])
    return [terms.loss.detach(), terms.drift.detach(), terms.kl, terms.forward_kl, terms.entropy, *gradients]


def test_full_loss_is_that_of_the_logits() -> None:
    at, head, teacher_head = positions()
    terms = token_terms(LossSpec("reverse_kl", "full", temperature=0.7), at, head, teacher_head)
    pi = softmax(at.student_hidden.double() @ head.double().T / 0.7)
    p = softmax(at.teacher_hidden.double() @ teacher_head.double().T / 0.7)
    np.testing.assert_allclose(terms.loss.detach().numpy(), (pi * np.log(pi / p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(terms.entropy.numpy(), -(pi * np.log(pi)).sum(-1), rtol=1e-4)


def test_drift_is_at_the_sampling_temperature() -> None:
    at, head, teacher_head = positions()
    terms = token_terms(LossSpec("reverse_kl", "full", sampling_temperature=0.5), at, head, teacher_head)
    pi = softmax(at.student_hidden.double() @ head.double().T / 0.5)[np.arange(23), at.tokens.numpy()]
    rho = pi / np.exp(at.behaviour.double().numpy())
    np.testing.assert_allclose(terms.drift.detach().numpy(), rho * np.log(rho) - rho + 1, rtol=1e-3, atol=1e-5)


def test_topk_loss_nears_the_full_one_as_k_grows() -> None:
    at, head, teacher_head = positions()
    full = token_terms(LossSpec("reverse_kl", "full"), at, head, teacher_head).loss.mean().item()
    teacher = torch.log_softmax(at.teacher_hidden @ teacher_head.T, -1)
    found = []
    for k in (2, 8, 18):
        top = teacher.topk(k, -1)
        some = replace(at, teacher_topk=top.values, teacher_topk_ids=top.indices)
        found.append(token_terms(LossSpec("reverse_kl", "topk"), some, head, None).loss.mean().item())
    assert found[0] < found[1] < found[2] <= full + 1e-5
    assert found[2] == pytest.approx(full, rel=1e-3)


def test_vocabularies_that_differ_in_padding() -> None:
    """The larger vocabulary is cut and renormalised."""
    at, head, teacher_head = positions()
    padded = torch.cat([teacher_head, torch.full((3, teacher_head.shape[1]), 7.0)])
    spec = LossSpec("forward_kl", "full")
    torch.testing.assert_close(token_terms(spec, at, head, padded).loss, token_terms(spec, at, head, teacher_head).loss)


def test_a_teacher_that_is_off_by_one_position_is_noticed() -> None:
    at, _, teacher_head = positions()
    same = replace(at, student_hidden=at.teacher_hidden.clone().requires_grad_())
    spec = LossSpec("reverse_kl", "full")
    assert token_terms(spec, same, teacher_head, teacher_head).loss.abs().max() < 1e-5
    shifted = replace(same, teacher_hidden=at.teacher_hidden.roll(1, 0))
    assert token_terms(spec, shifted, teacher_head, teacher_head).loss.mean() > 0.5


def test_objective_averages_by_sample_or_token() -> None:
    losses, drifts = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    lengths, weights = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 1.0])
    by_sample = objective(losses, drifts, lengths, weights, 0.1, "sample", global_samples=4, global_tokens=99)
    assert by_sample.item() == pytest.approx((0.5 * (1 + 1) + 1.0 * (2 + 2)) / 4)
    by_token = objective(losses, drifts, lengths, weights, 0.0, "token", global_samples=99, global_tokens=8)
    assert by_token.item() == pytest.approx((0.5 * 1 * 1 + 1.0 * 3 * 2) / 8)
