"""From per-position terms to the scalar that is minimised.

    L = sum_i share_i w_i ( l_i + lambda D_roll_i )

`average: sample` is the paper's mean over i: share_i = 1/B, l_i the mean over sample i's tokens, so samples
count alike. `average: token` makes share_i the sample's part of all loss-bearing tokens. Both divide by
*global* counts that the caller supplies, so the sum is the same for any split into micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, assert_never

import torch
from torch import Tensor

from fopd_cli.losses.chunked import Weighting


def shares(lengths: Tensor, average: Literal["sample", "token"], samples: int, tokens: int) -> Tensor:
    """share_i `(n,)` of samples with `lengths` loss-bearing tokens, in a batch of `samples` and `tokens`."""
    match average:
        case "token":
            return lengths / tokens
        case "sample":
            return torch.full_like(lengths, 1 / samples)
        case _:
            assert_never(average)


def weighting(
    sample: Tensor,
    loss_bearing: Tensor,
    aligned: Tensor,
    share: Tensor,
    anchor: float | Tensor,
    weigh: Callable[[Tensor, Tensor], Tensor] | None,
) -> Weighting:
    """Each position's coefficients. `sample`, `loss_bearing`, `aligned` `(N,)`; `share` `(n,)`; `anchor` is
    lambda, or each sample's own `(n,)`.
    """
    used = aligned & loss_bearing

    def mean(mask: Tensor) -> Tensor:
        ones = mask.to(share.dtype)
        count = torch.zeros_like(share).index_add(0, sample, ones)
        return ones / count.clamp(min=1)[sample]

    in_drift = mean(used)
    pull = anchor[sample] if isinstance(anchor, Tensor) else anchor
    return Weighting(
        sample, mean(loss_bearing) * share[sample], in_drift * share[sample] * pull, in_drift, weigh
    )
