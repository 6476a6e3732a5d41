"""What to expect of a lag before a run: for its kind of loss and control, what runs of ours kept of their
synchronous score (docs/staleness.md). They were small, so this is a warning and not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fopd_cli.freshness.policies import POLICIES
from fopd_cli.recipe import Recipe

Kind = Literal["exact", "anchored", "trust", "ratio", "bare"]

# The share of the synchronous run's score that is left, by lag: the short task at 1e-3, one to ten seeds, of
# exact losses the lowest of four without any control.
KEPT: dict[Kind, dict[int, float]] = {
    "exact": {2: 0.98, 4: 0.98, 8: 0.98, 16: 0.96},
    "anchored": {2: 1.33, 4: 1.24, 8: 1.04, 16: 1.00, 32: 1.14},
    "trust": {2: 1.12, 4: 1.02, 8: 0.81, 16: 0.38},
    "ratio": {2: 0.88, 4: 0.69, 8: 0.0, 16: 0.0},
    "bare": {2: 0.0, 4: 0.0, 8: 0.0, 16: 0.0},
}
NAMES: dict[Kind, str] = {
    "exact": "exact losses without any control",
    "anchored": "policy gradients with a strong anchor",
    "trust": "policy gradients with policy trust",
    "ratio": "policy gradients with an importance ratio and no strong anchor",
    "bare": "policy gradients without a strong anchor",
}
STRONG = {"topk": 10.0, "exact": 10.0, "quadratic": 10.0, "sampled": 30.0}  # the least lambda that held
ENOUGH = 0.9
SCALE = "measured at CPU scale: docs/staleness.md"


@dataclass(frozen=True)
class Outlook:
    """`kept` is the share of the synchronous score, at the nearest lag that was measured and is not shorter
    (or at the longest one).
    """

    kind: Kind
    lag: int
    measured: int
    kept: float

    @property
    def safe(self) -> bool:
        return self.kept >= ENOUGH

    def __str__(self) -> str:
        beyond = "" if self.measured >= self.lag else f" (longer ones were not tried; here it is {self.lag})"
        found = f"at lag {self.measured}{beyond} {NAMES[self.kind]} kept {min(self.kept, 1):.0%}"
        return f"{found} of their synchronous score ({SCALE})"


def outlook(recipe: Recipe) -> Outlook | None:
    """None for a run without lag, and for a loss that was not tried with one."""
    lag = recipe.max_lag
    if lag == 0 or recipe.support == "mc":
        return None
    kind = _kind(recipe)
    measured = min((at for at in KEPT[kind] if at >= lag), default=max(KEPT[kind]))
    return Outlook(kind, lag, measured, KEPT[kind][measured])


def _kind(recipe: Recipe) -> Kind:
    if recipe.support in ("full", "topk"):
        return "exact"
    if recipe.anchor >= STRONG[recipe.drift]:
        return "anchored"
    if POLICIES[recipe.freshness.policy].trust:
        return "trust"
    return "ratio" if recipe.importance is True else "bare"
