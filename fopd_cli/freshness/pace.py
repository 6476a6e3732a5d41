"""How strong the anchor is, by the lag of each sample. Ours, not the paper's.

    lambda_i = min( lambda, max( 1, pace / tau_i ) )

With the importance ratio rho = pi_t/pi_r and A = log p - log pi_r, what a sample of the cached policy
gradient and its anchor minimise is, in expectation over y ~ pi_r,

    lambda KL(pi_t || pi_r) - E_{pi_t}[A],        least where pi_t is proportional to pi_r exp(A / lambda)

so one generation of samples moves the student by a share 1/lambda of the way, in log-probs, from the version
that sampled them to the teacher. A generation lasts tau steps. A constant lambda is therefore a speed limit
that tightens as the lag grows: after T steps (1 - 1/lambda)^(T/tau) of the way is left, which at lambda 20,
lag 8 and 60 steps is 68%. `pace` = lambda tau, the steps it takes to go the way once, holds the limit where
it is. At lambda 1 the sum is exactly KL(pi_t || p), only estimated with more noise: there is no reason to go
lower.

Without rho there is no such optimum. A token with A < -lambda/e is pushed down without end: the push stays as
it is, while the anchor's pull, pi_t log(pi_t/pi_r), never exceeds pi_r/e and vanishes with pi_t. So a low
lambda needs the ratio, which `loss.importance: auto` adds wherever a pace can lower lambda.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1.0


def strength(lag: Tensor, most: float, pace: float) -> Tensor:
    """lambda_i, float32, in the shape of the `lag` in optimizer steps. `most` is the recipe's lambda, `pace`
    in optimizer steps.
    """
    whole = lag.new_full(lag.shape, most, dtype=torch.float32)
    return whole.minimum((pace / lag).clamp(min=LEAST))
