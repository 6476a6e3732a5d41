"""Names that recipe, losses and engines share. This module does not import torch."""

from __future__ import annotations

from typing import Literal

LossKind = Literal["forward_kl", "reverse_kl", "jsd"]  # each has a formula in `losses/divergence.py`
Support = Literal["full", "topk", "sampled", "mc"]
Advantage = Literal["cached", "recomputed"]
DriftKind = Literal["sampled", "quadratic", "topk", "exact"]
TargetKind = Literal["hidden", "topk", "sampled"]  # what a teacher hands over for each token
