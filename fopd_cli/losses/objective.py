"""From per-position terms to the scalar that is minimised.

    L = mean_i( w_i l_i ) + lambda mean_i( w_i D_roll_i )

`average: sample` is the paper's: l_i is the mean over sample i's tokens, and samples count alike. `average: token`
weighs every loss-bearing token alike. Both divide by *global* counts that the caller supplies, so that the sum over
any split into micro-batches and ranks is the same number.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def objective(
    losses: Tensor,
    drifts: Tensor,
    lengths: Tensor,
    weights: Tensor,
    anchor: float,
    average: Literal["sample", "token"],
    global_samples: int,
    global_tokens: int,
) -> Tensor:
    """This micro-batch's share of L. All tensors `(samples,)`; `weights` carry no gradient."""
    share = lengths / global_tokens if average == "token" else 1.0 / global_samples
    terms = losses if anchor == 0 else losses + anchor * drifts
    return (weights * share * terms).sum()
