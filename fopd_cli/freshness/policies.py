"""The control policies that a recipe can name: what each switches on. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PolicyName = Literal[
    "sync", "async", "fixed_refresh", "lag_weight", "reweight", "reweight+anchor", "fopd", "trust"
]


@dataclass(frozen=True)
class Policy:
    """What a named row of the tables switches on."""

    weights: Literal["one", "lag", "freshness"]
    anchor: bool = False
    refresh: Literal["never", "fixed", "adaptive"] = "never"
    trust: bool = False  # the token's trust region (`trust.py`)
    ahead: bool = False  # how far sampling runs ahead follows the drift (`ahead.py`)


POLICIES: dict[str, Policy] = {
    "sync": Policy(weights="one"),  # and max_lag 0, which the recipe checks
    "async": Policy(weights="one"),
    "fixed_refresh": Policy(weights="one", refresh="fixed"),
    "lag_weight": Policy(weights="lag"),
    "reweight": Policy(weights="freshness"),
    "reweight+anchor": Policy(weights="freshness", anchor=True),
    "fopd": Policy(weights="freshness", anchor=True, refresh="adaptive", ahead=True),
    # Ours, not the paper's.
    "trust": Policy(weights="one", trust=True),
}


def largest_xi(max_lag: int) -> float:
    """The score's bound (`score.py`), f_i <= 1/(tau_i + 1): at this threshold or above, a perfectly fresh
    sample of full lag is gated out.
    """
    return 1.0 / (max_lag + 1)
