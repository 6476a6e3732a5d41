"""What measured staleness changes about a run: how far sampling runs ahead, and when the buffer is
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fopd_cli.freshness.ahead import Ahead
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.freshness.refresh import Refresh
from fopd_cli.recipe import Recipe
from fopd_cli.samples import SampleStats, StepReport


class Control:
    """Looks at every optimizer step's batch."""

    def __init__(self, recipe: Recipe) -> None:
        self._steps = recipe.learner.steps
        self._ahead = Ahead(recipe.max_lag, recipe.max_drift)
        r = recipe.freshness.refresh
        mode = POLICIES[recipe.freshness.policy].refresh
        self._refresh = Refresh(mode, r.mean, r.coverage_roll, r.coverage_sup, r.every_at_least, r.every)

    @property
    def ahead(self) -> int:
        """Optimizer steps that sampling may run ahead."""
        return self._ahead.now

    def learned(self, report: StepReport) -> int:
        """After an optimizer step: how far sampling may run ahead from now on."""
        return self._ahead.update(report.stats.lag, report.drift_above_floor)

    def stale(self, step: int, stats: SampleStats) -> str | None:
        """Why the buffer must be dropped after `step` optimizer steps, given the `stats` of the last batch;
        None: it need not be.
        """
        if step == self._steps:
            return None
        means = (stats.freshness.mean(), stats.coverage_roll.mean(), stats.coverage_sup.mean())
        reason = self._refresh.reason(step, *map(float, means))
        if reason is not None:
            self._refresh.last = step
        return reason

    def state_dict(self) -> dict[str, Any]:
        return {
            "refresh_last": self._refresh.last,
            "depth": {"now": self._ahead.now, "waited": self._ahead.waited},  # as older checkpoints have it
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._refresh.last = state["refresh_last"]
        self._ahead.resume(**state["depth"])
