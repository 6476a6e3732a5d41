"""Freshness of a single token: has the student already gone where this token's signal sends it?

Ours, not the paper's. `f_i` weighs a whole sample, and at one lag all samples weigh alike; but what makes a
late policy gradient run away is that each of its tokens keeps pushing, for as many steps as the lag has, a
student that has long moved. The clip of PPO (arXiv 1707.06347, equation 7) is the known remedy where several
steps are taken on one batch, and a lag of k is that: k steps are taken before a sample's own comes. A token
whose log-prob has moved by more than `width` nats in the direction of its signal since it was sampled says
nothing more; one that moved against it still does, so the way back stays open.
"""

from __future__ import annotations

from torch import Tensor


def spent(signal: Tensor, log_rho: Tensor, width: float) -> Tensor:
    """Bool `(...)`: tokens to leave out. `signal` is the advantage log p - log pi, `log_rho` = log pi_t(y) -
    log pi_r(y), in nats.
    """
    return log_rho * signal.sign() > width
