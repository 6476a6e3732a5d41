"""What to expect of a lag before a run: for its kind of loss and control, what runs of ours kept of their
synchronous score (docs/staleness.md). They were small, so this is a warning and not a forecast.

It shows all learning rates of our map and chooses none by the recipe's: rates do not carry over to other
models (a real pair collapsed at a rate and lag at which the small one kept 88%). Which of them a run is like
shows in how fast its student moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fopd_cli.freshness.policies import POLICIES
from fopd_cli.names import DriftKind
from fopd_cli.recipe import Recipe

Kind = Literal["exact", "paced", "constant", "quadratic", "sampled", "trust", "ratio", "bare"]

# The share of the synchronous run's score that is left, by lag: the short task at 1e-3, one to ten seeds, of
# exact losses the lowest of four without any control.
KEPT: dict[Kind, dict[int, float]] = {
    "exact": {2: 0.98, 4: 0.98, 8: 0.98, 16: 0.96},
    "paced": {4: 1.28, 8: 1.26, 16: 1.2, 32: 1.08},
    "constant": {2: 1.33, 4: 1.24, 8: 1.04, 16: 0.94, 32: 0.88},
    "quadratic": {2: 1.12, 4: 1.07, 8: 0.87, 16: 0.55},
    "sampled": {8: 0.78},
    "trust": {2: 1.12, 4: 1.02, 8: 0.81, 16: 0.38},
    "ratio": {2: 0.88, 4: 0.69, 8: 0.0, 16: 0.0},
    "bare": {2: 0.0, 4: 0.0, 8: 0.0, 16: 0.0},
}
# The same at lower rates, of the policies that the map has there (one seed each, at 3e-4 and lag 8 three).
SLOWER: dict[str, dict[Kind, dict[int, float]]] = {
    "3e-4": {
        "paced": {4: 0.96, 8: 0.98, 16: 1.03},
        "constant": {2: 1.01},
        "trust": {2: 1.01, 4: 1.07, 8: 0.96, 16: 1.01},
        "bare": {2: 0.95, 4: 0.0, 8: 0.03, 16: 0.0},
    },
    "1e-4": {
        "paced": {4: 0.96, 8: 0.96, 16: 1.02},
        "constant": {2: 0.9},
        "trust": {2: 0.83, 4: 0.98, 8: 0.94, 16: 1.0},
        "bare": {2: 0.92, 4: 0.88, 8: 0.88, 16: 0.0},
    },
}
RATES = ("1e-4", "3e-4", "1e-3")
# Reverse KL of a real pair after 40 steps: the share of the synchronous run's fall in KL on the teacher's
# answers, by exact lag without control, and where the clock decides the lag, up to 8, under max_drift. On the
# student's own answers, max_drift made no difference beyond noise.
REAL_PAIR = {4: 0.99, 8: 0.96, 16: 0.91}
HELD_BACK = 1.0
NOTHING, PUBLISHED, STRONGEST = "no control", "f-OPD as published", "a strong anchor (the defaults)"
# The least that was not shown to lose, by lag and then at each of these rates: docs/staleness/regions.md, the
# short task's cached policy gradient. Its exact loss needs nothing in any of these places.
NEEDED: dict[int, tuple[str, ...]] = {
    2: (NOTHING, NOTHING, STRONGEST),
    4: (NOTHING, PUBLISHED, STRONGEST),
    8: (NOTHING, PUBLISHED, STRONGEST),
    16: (PUBLISHED, PUBLISHED, STRONGEST),
}
NAMES: dict[Kind, str] = {
    "exact": "exact losses without any control",
    "paced": "policy gradients with an anchor that weakens with the lag",
    "constant": "policy gradients with a strong anchor",
    "quadratic": "policy gradients with a quadratic anchor",
    "sampled": "policy gradients with an anchor from the sampled token",
    "trust": "policy gradients with policy trust",
    "ratio": "policy gradients with an importance ratio and no strong anchor",
    "bare": "policy gradients without a strong anchor",
}
# The least lambda that held, and what such an anchor is, by the estimator of its drift.
STRONG: dict[DriftKind, tuple[float, Kind]] = {
    "topk": (10.0, "constant"),
    "exact": (10.0, "constant"),
    "quadratic": (10.0, "quadratic"),
    "sampled": (30.0, "sampled"),
}
ENOUGH = 0.9
SCALE = "measured at CPU scale, and rates do not carry over between models: docs/staleness.md"


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
        at = self.measured
        beyond = "" if at >= self.lag else f" (longer ones were not tried; here it is {self.lag})"
        slower = {
            rate: found[self.kind][at] for rate, found in SLOWER.items() if at in found.get(self.kind, ())
        }
        others = "".join(f", {min(kept, 1):.0%} at {rate}" for rate, kept in slower.items())
        return (
            f"at lag {at}{beyond} {NAMES[self.kind]} kept {min(self.kept, 1):.0%} of their synchronous score "
            f"at learning rate {RATES[-1]}{others}; {self._needed()} ({SCALE})"
        )

    def _needed(self) -> str:
        """The least control that held in the map, at each of its rates."""
        if self.kind == "exact":
            at = min((at for at in REAL_PAIR if at >= self.measured), default=max(REAL_PAIR))
            return (
                "reverse KL needed none at 3e-4 and 1e-4 either; a real pair kept "
                f"{REAL_PAIR[at]:.0%} of the gain on the teacher's answers after 40 steps at lag {at}, and "
                f"{HELD_BACK:.0%} up to lag 8 where freshness.max_drift held sampling back"
            )
        at = min(self.measured, max(NEEDED))
        needed = ", ".join(f"{least} at {rate}" for rate, least in zip(RATES, NEEDED[at], strict=True))
        return f"the least not shown to lose at lag {at}: {needed}"


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
    least, kind = STRONG[recipe.drift]
    if recipe.anchor >= least:
        return kind if recipe.pace is None else "paced"
    if POLICIES[recipe.freshness.policy].trust:
        return "trust"
    return "ratio" if recipe.importance is True else "bare"
