"""The anchor's strength by lag, and what it makes of the cached policy gradient: against the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fopd_cli.freshness.pace import strength
from fopd_cli.losses.terms import LossSpec, Positions, terms_of


def test_the_anchor_weakens_with_the_lag_within_bounds() -> None:
    lag = torch.tensor([0, 1, 2, 6, 7, 16, 128, 500])
    expected = [20, 20, 20, 20, 128 / 7, 8, 1, 1]
    assert strength(lag, 20.0, 128.0).tolist() == pytest.approx(expected)
    assert strength(lag, 0.5, 128.0).tolist() == [0.5] * 8, "a recipe's weaker anchor stays"
    assert strength(lag, 0.0, 128.0).tolist() == [0.0] * 8


def expected_gradient(logits: Tensor, behaviour: Tensor, teacher: Tensor, anchor: float) -> Tensor:
    """By logits `(V,)`, of the anchored cached loss with the ratio, in expectation over y ~ pi_r."""
    every, k = torch.arange(len(logits)), len(logits) - 1
    spec = LossSpec("reverse_kl", "sampled", advantage="cached", importance=True, drift="topk")
    z = logits.clone().requires_grad_()
    at = Positions(
        tokens=every,
        behaviour=behaviour,
        behaviour_topk=behaviour[:k].expand(len(every), k),
        behaviour_topk_ids=every[:k].expand(len(every), k),
        teacher_logprobs=teacher,
    )
    loss, drifts, *_ = terms_of(spec, at, z.expand(len(every), -1), torch.empty(0))
    (behaviour.exp() * (loss + anchor * drifts)).sum().backward()
    assert z.grad is not None
    return z.grad


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits[0], torch.log_softmax(logits[1], -1), torch.log_softmax(logits[2], -1)


def test_at_strength_one_it_is_the_reverse_kl_of_the_student_now() -> None:
    logits, behaviour, teacher = distributions()
    pi = torch.softmax(logits, -1)
    gap = pi.log() - teacher
    expected = pi * (gap - (pi * gap).sum())  # d KL(pi_t || p) / d logits
    torch.testing.assert_close(expected_gradient(logits, behaviour, teacher, 1.0), expected)


@pytest.mark.parametrize("anchor", [1.0, 4.0, 20.0])
def test_it_rests_a_share_of_the_way_to_the_teacher(anchor: float) -> None:
    _, behaviour, teacher = distributions()
    rest = behaviour + (teacher - behaviour) / anchor
    gradient = expected_gradient(rest, behaviour, teacher, anchor)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
