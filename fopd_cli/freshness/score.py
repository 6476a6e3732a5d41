"""The freshness score (equation 11), and the sample weights made from it.

    f_i = exp( -( alpha sqrt(D_roll_i) + beta sqrt(D_sup_i) ) ) / (tau_i + 1)
    w_i = relu( f_i - xi )
    L   = mean_i( w_i l_i ) + lambda mean_i( w_i D_roll_i )

The square roots are Pinsker's: they stand in for the two total-variation terms that bound the gap between the
asynchronous and the synchronous objective. `f` ranks samples; it is not an unbiased estimate of anything.
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from fopd_cli.freshness.policies import Policy


def freshness(
    lag: Tensor,
    drift_roll: Tensor,
    drift_sup: Tensor,
    coverage_roll: Tensor,
    coverage_sup: Tensor,
    alpha: float,
    beta: float,
) -> Tensor:
    """f_i in [0, 1] (equation 11), all arguments `(samples,)`; 0 if no position of a sample is aligned."""
    distance = alpha * drift_roll.clamp(min=0).sqrt() + beta * drift_sup.clamp(min=0).sqrt()
    score = torch.exp(-distance) / (lag + 1)
    return torch.where((coverage_roll > 0) & (coverage_sup > 0), score, 0.0)


def weights(policy: Policy, score: Tensor, lag: Tensor, xi: float) -> Tensor:
    """w_i `(samples,)`, no gradient. `lag` weighs by just 1/(tau + 1), the score without its drifts."""
    match policy.weights:
        case "one":
            return torch.ones_like(score)
        case "lag":
            basis = 1.0 / (lag.to(score.dtype) + 1)
        case "freshness":
            basis = score
        case _:
            assert_never(policy.weights)
    return torch.relu(basis.detach() - xi)
