"""Numerics shared by `freshness/` and `losses/`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_HALF = math.log(0.5)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation at either end (Maechler 2012)."""
    small = x > LOG_HALF
    # Each branch sees only valid arguments, so that gradients of the branch not taken are not nan.
    near = torch.log(-torch.expm1(torch.where(small, x, LOG_HALF)))
    far = torch.log1p(-torch.exp(torch.where(small, LOG_HALF, x)))
    return torch.where(small, near, far)
