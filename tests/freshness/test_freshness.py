"""freshness/ against independent float64 formulas and simulation."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fopd_cli.collapse import collapse
from fopd_cli.freshness import drift, score, trust
from fopd_cli.freshness.policies import POLICIES, largest_xi
from fopd_cli.freshness.refresh import Refresh
from fopd_cli.tensors import log1mexp


def random_logprobs(rows: int, vocab: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64), -1)


def numpy_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def test_exact_is_kl_of_new_from_old() -> None:
    new, old = random_logprobs(5, 11, 0), random_logprobs(5, 11, 1)
    expected = numpy_kl(new.exp().numpy(), old.exp().numpy())
    np.testing.assert_allclose(drift.exact(new, old).numpy(), expected, rtol=1e-12)


def test_exact_takes_zero_probabilities() -> None:
    new = torch.tensor([[0.5, 0.5, 0.0]]).log()
    old = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert drift.exact(new, old).item() == pytest.approx(math.log(2))


def test_topk_is_kl_over_merged_classes() -> None:
    new, old = random_logprobs(4, 9, 2), random_logprobs(4, 9, 3)
    ids = old.topk(3, -1).indices
    merged = [
        np.concatenate(
            [x.exp().gather(-1, ids).numpy(), 1 - x.exp().gather(-1, ids).sum(-1, keepdim=True).numpy()], -1
        )
        for x in (new, old)
    ]
    found = drift.topk(new.gather(-1, ids), old.gather(-1, ids))
    np.testing.assert_allclose(found.numpy(), numpy_kl(*merged), rtol=1e-9)


def test_topk_rises_to_exact_as_k_grows() -> None:
    new, old = random_logprobs(20, 32, 4), random_logprobs(20, 32, 5)
    order = old.argsort(-1, descending=True)
    values = [
        drift.topk(new.gather(-1, order[:, :k]), old.gather(-1, order[:, :k])).mean() for k in (1, 4, 16, 31)
    ]
    assert all(a < b for a, b in pairwise(values))
    assert values[-1] <= drift.exact(new, old).mean() + 1e-9
    assert values[-1].item() == pytest.approx(drift.exact(new, old).mean().item(), rel=1e-3)


def test_sampled_is_unbiased_and_never_negative() -> None:
    """Its expectation under pi_r, computed exactly by summing over the vocabulary, is the KL."""
    new, old = random_logprobs(6, 13, 6), random_logprobs(6, 13, 7)
    every_token = drift.sampled(new, old)
    assert (every_token >= 0).all()
    np.testing.assert_allclose(
        (old.exp() * every_token).sum(-1).numpy(), drift.exact(new, old).numpy(), rtol=1e-9
    )


def test_sampled_gradient_is_that_of_the_kl() -> None:
    logits = torch.randn(13, dtype=torch.float64, requires_grad=True)
    old = random_logprobs(1, 13, 8)[0]
    (old.exp() * drift.sampled(torch.log_softmax(logits, -1), old)).sum().backward()
    ours = logits.grad.clone()
    logits.grad = None
    drift.exact(torch.log_softmax(logits, -1), old).backward()
    np.testing.assert_allclose(ours.numpy(), logits.grad.numpy(), rtol=1e-8, atol=1e-12)


def test_quadratic_is_the_kl_of_near_policies_and_pulls_on_tokens_given_up() -> None:
    old = random_logprobs(6, 13, 6)
    new = torch.log_softmax(old + 1e-3 * random_logprobs(6, 13, 7), -1)
    np.testing.assert_allclose(
        (old.exp() * drift.quadratic(new, old)).sum(-1), drift.exact(new, old), rtol=1e-2
    )
    gone, before = torch.tensor(-12.0, requires_grad=True), torch.tensor(-1.0)
    (pull,) = torch.autograd.grad(drift.quadratic(gone, before), gone)
    (slack,) = torch.autograd.grad(drift.sampled(gone, before), gone)
    assert pull.item() == pytest.approx(-11)
    assert abs(slack.item()) < 1e-3


@pytest.mark.parametrize("kind", ["sampled", "quadratic"])
def test_slope_is_the_derivative_up_to_the_limit(kind: str) -> None:
    old = torch.zeros(5)
    new = torch.tensor([-70.0, -2.0, 0.0, 3.0, 61.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(drift.ONE_TOKEN[kind](new, old).sum(), new)
    torch.testing.assert_close(drift.slope(kind, new.detach(), old), gradient)
    assert drift.slope(kind, torch.tensor(1e4), torch.tensor(0.0)) == 0


@pytest.mark.parametrize("kind", ["sampled", "quadratic"])
def test_far_apart_is_finite(kind: str) -> None:
    assert torch.isfinite(drift.ONE_TOKEN[kind](torch.tensor([0.0]), torch.tensor([-1e4]))).all()


def test_same_policy_has_no_drift() -> None:
    p = random_logprobs(3, 7, 9)
    assert drift.exact(p, p).abs().max() < 1e-15
    assert drift.sampled(p, p).abs().max() == 0
    assert drift.quadratic(p, p).abs().max() == 0
    assert drift.topk(p[:, :2], p[:, :2]).abs().max() < 1e-15


def test_per_sample_means_and_coverage() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, float("nan"), 9.0])
    sample = torch.tensor([0, 0, 0, 1, 1, 2])
    loss_bearing = torch.tensor([True, True, False, True, True, False])
    aligned = torch.tensor([True, True, True, True, False, True])
    mean, coverage = drift.per_sample(values, aligned, loss_bearing, sample, 3)
    assert mean.tolist() == [2.0, 7.0, 0.0]
    assert coverage.tolist() == [1.0, 0.5, 0.0]


def test_noise_floor_is_a_mean_that_later_forgets() -> None:
    floor = drift.NoiseFloor(memory=4)
    floor.update([1.0, 3.0])
    assert floor.value == 2.0
    floor.update([2.0, 2.0, 6.0])
    assert floor.value == 3.0  # the fifth counts 1/4, not 1/5
    assert floor.subtract(torch.tensor([1.0, 5.0])).tolist() == [0.0, 2.0]


@given(st.integers(0, 50), st.floats(0, 30), st.floats(0, 30), st.floats(0, 3), st.floats(0, 3))
def test_score_is_equation_11(lag: int, roll: float, sup: float, alpha: float, beta: float) -> None:
    f = score.freshness(
        *(torch.tensor([x], dtype=torch.float64) for x in (lag, roll, sup, 1.0, 1.0)), alpha, beta
    )
    expected = math.exp(-(alpha * math.sqrt(roll) + beta * math.sqrt(sup))) / (lag + 1)
    assert f.item() == pytest.approx(expected, rel=1e-12)
    assert f.item() <= largest_xi(lag)


def test_score_is_zero_where_nothing_is_aligned() -> None:
    one = torch.ones(3)
    f = score.freshness(
        one * 0, one * 0, one * 0, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 1, 1
    )
    assert f.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("sync", [1.0, 1.0]),
        ("async", [1.0, 1.0]),
        ("fixed_refresh", [1.0, 1.0]),
        ("lag_weight", [0.9, 0.15]),
        ("reweight", [0.7, 0.0]),
        ("reweight+anchor", [0.7, 0.0]),
        ("fopd", [0.7, 0.0]),
        ("trust", [1.0, 1.0]),
    ],
)
def test_policies_weigh_as_named(policy: str, expected: list[float]) -> None:
    found = score.weights(
        POLICIES[policy], torch.tensor([0.8, 0.05], dtype=torch.float64), torch.tensor([0, 3]), xi=0.1
    )
    assert found.tolist() == pytest.approx(expected)


def test_only_the_named_policies_anchor_and_refresh() -> None:
    assert {n for n, p in POLICIES.items() if p.anchor} == {"reweight+anchor", "fopd"}
    assert {n for n, p in POLICIES.items() if p.trust} == {"trust"}
    assert {n: p.refresh for n, p in POLICIES.items() if p.refresh != "never"} == {
        "fixed_refresh": "fixed",
        "fopd": "adaptive",
    }


def test_spent_tokens_are_those_that_moved_with_their_signal() -> None:
    signal = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    log_rho = torch.tensor([0.3, 0.1, -0.3, -0.3, -0.1, 0.3, 9.0])
    assert trust.spent(signal, log_rho, 0.2).tolist() == [True, False, False, True, False, False, False]


@given(st.floats(-5, 5), st.floats(-3, 3), st.floats(0.05, 1))
def test_the_trust_region_is_the_clip_of_ppo(signal: float, log_rho: float, width: float) -> None:
    """PPO's min(rho A, clip(rho) A) has no gradient exactly where a token is spent, with bounds e^-width and
    e^width.
    """
    moved = torch.tensor(log_rho, dtype=torch.float64, requires_grad=True)
    rho = moved.exp()
    torch.minimum(rho * signal, rho.clamp(math.exp(-width), math.exp(width)) * signal).backward()
    gated = trust.spent(torch.tensor(signal), torch.tensor(log_rho), width)
    if abs(abs(log_rho) - width) > 1e-6 and abs(signal) > 1e-6:
        assert (moved.grad == 0) == gated


def test_adaptive_refresh_obeys_thresholds_and_interval() -> None:
    refresh = Refresh("adaptive", mean=0.2, coverage_roll=0.5, coverage_sup=0.6, every_at_least=10, every=3)
    assert refresh.reason(9, 0.0, 0.0, 0.0) is None
    assert refresh.reason(10, 0.21, 0.5, 0.6) is None
    assert "freshness" in refresh.reason(10, 0.2, 1, 1)
    assert "rollout coverage" in refresh.reason(10, 0.3, 0.49, 1)
    assert "supervision coverage" in refresh.reason(10, 0.3, 1, 0.59)
    refresh.last = 10
    assert refresh.reason(19, 0.0, 0.0, 0.0) is None


def test_fixed_refresh_and_never() -> None:
    fixed = Refresh("fixed", 0, 0, 0, every_at_least=1000, every=3)
    assert [bool(fixed.reason(step, 1, 1, 1)) for step in (1, 2, 3)] == [False, False, True]
    assert Refresh("never", 1, 1, 1, 1, 1).reason(100, 0, 0, 0) is None


@given(st.floats(-60, -1e-12))
def test_log1mexp(x: float) -> None:
    with localcontext(Context(prec=60)):
        expected = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-12, abs=1e-300
    )


def test_collapse_by_the_papers_definition() -> None:
    """More than 40% under the peak at the end, and under 90% of it in all of the last tenth."""
    steady = [(0, 0.1), (50, 0.5), (90, 0.48), (100, 0.5)]
    assert not collapse(steady, 100).collapsed
    fallen = [(0, 0.1), (50, 0.5), (90, 0.3), (95, 0.2), (100, 0.29)]
    assert collapse(fallen, 100).collapsed
    assert collapse(fallen, 100).drop == pytest.approx(0.21)
    assert not collapse([*fallen[:-1], (100, 0.31)], 100).collapsed, "final is over 60% of the peak"
    assert not collapse([(0, 0.1), (50, 0.5), (91, 0.46), (100, 0.2)], 100).collapsed, (
        "it was near its peak a moment ago"
    )
