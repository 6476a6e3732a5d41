"""The anchor's strength by lag, and what it makes of the cached policy gradient: against the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fopd_cli.freshness.pace import strength
from fopd_cli.losses.terms import LossSpec, Positions, terms_of
from fopd_cli.names import Importance


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


def test_only_paced_positions_have_the_ratio() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 6, generator=generator)
    tokens, paced = torch.tensor([0, 5, 2, 2]), torch.tensor([True, False, False, True])
    behaviour, teacher = -torch.rand(2, 4, generator=generator)
    at = Positions(tokens=tokens, behaviour=behaviour, teacher_logprobs=teacher, paced=paced)

    def found(importance: Importance, at: Positions) -> tuple[Tensor, Tensor]:
        """The gradient by logits, and what is at a limit."""
        z = logits.clone().requires_grad_()
        spec = LossSpec("reverse_kl", "sampled", importance=importance, max_ratio=1.1)
        loss, *_, clamped = terms_of(spec, at, z, torch.empty(0))
        loss.sum().backward()
        assert z.grad is not None
        return z.grad, clamped

    every, none = found(True, at), found(False, at)
    assert not torch.equal(every[0][3], none[0][3])
    for own, with_ratio, without in zip(found("paced", at), every, none, strict=True):
        assert torch.equal(own[paced], with_ratio[paced])
        assert torch.equal(own[~paced], without[~paced])
    assert torch.equal(found("paced", replace(at, paced=None))[0], none[0])


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
