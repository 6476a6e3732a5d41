"""When to drop the buffer: adaptively, when it has gone stale (f-OPD), or every fixed number of steps (the
baseline).

The buffer is judged by the batch just taken from it: its freshness is a by-product of the learner's own
forward pass, while scoring the whole buffer would need another one. A refresh drops every sample not yet
trained on, in the sampler as well as in the buffer, and their prompts are sampled again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never


@dataclass
class Refresh:
    """Decides after each optimizer step; `last` is the step of the last refresh and is saved with the
    checkpoint.
    """

    mode: Literal["never", "fixed", "adaptive"]
    mean: float  # kappa_f
    coverage_roll: float  # kappa_roll
    coverage_sup: float  # kappa_sup
    every_at_least: int  # adaptive: fewest optimizer steps between two refreshes
    every: int  # fixed: optimizer steps between two refreshes
    last: int = 0

    def reason(
        self, step: int, mean_freshness: float, coverage_roll: float, coverage_sup: float
    ) -> str | None:
        """Why to refresh after `step` completed optimizer steps, or None. Arguments are the batch's means."""
        since = step - self.last
        match self.mode:
            case "never":
                return None
            case "fixed":
                return f"every {self.every} steps" if since >= self.every else None
            case "adaptive":
                return self._stale(since, mean_freshness, coverage_roll, coverage_sup)
            case _:
                assert_never(self.mode)

    def _stale(
        self, since: int, mean_freshness: float, coverage_roll: float, coverage_sup: float
    ) -> str | None:
        if since < self.every_at_least:
            return None
        if mean_freshness <= self.mean:
            return f"mean freshness {mean_freshness:.4f} <= {self.mean}"
        if coverage_roll < self.coverage_roll:
            return f"rollout coverage {coverage_roll:.3f} < {self.coverage_roll}"
        if coverage_sup < self.coverage_sup:
            return f"supervision coverage {coverage_sup:.3f} < {self.coverage_sup}"
        return None
