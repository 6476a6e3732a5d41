"""Freshness of a single token: has the student already gone where this token's advantage sends it?

Ours, not the paper's. `f_i` weighs a whole sample, and at a given lag all weigh alike. But a late policy
gradient runs away because each of its tokens keeps pushing, for as many steps as the lag, a student that has
long since moved. PPO's clip (arXiv 1707.06347, equation 7) is the known remedy where several steps are taken
on one batch, and a lag of k is the same: k steps are taken before a sample's own. A token whose log-prob has
moved by more than `width` nats in the direction of its advantage since it was sampled is left out; one that
moved against it still counts, so the way back stays open.
"""

from __future__ import annotations

from torch import Tensor


def spent(advantage: Tensor, log_rho: Tensor, width: float) -> Tensor:
    """Bool `(...)`: tokens to leave out. `advantage` is log p - log pi, `log_rho` = log pi_t(y) - log
    pi_r(y), in nats.
    """
    return log_rho * advantage.sign() > width
