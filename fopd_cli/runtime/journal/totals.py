"""Sums over a whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fopd_cli.samples import SampleStats


@dataclass
class Totals:
    """Restarts included; saved with the checkpoint."""

    wall_seconds: float = 0.0
    generated_tokens: int = 0
    trained_tokens: int = 0
    freshness_sum: float = 0.0
    samples: int = 0
    max_lag: int = 0
    skipped_steps: int = 0
    restarts: int = 0  # of every engine but the learner
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by version

    def count(self, stats: SampleStats, skipped: bool) -> None:
        """A batch was trained on; `skipped`: all of its weights were 0."""
        self.trained_tokens += int(stats.length[stats.weight > 0].sum())
        self.freshness_sum += float(stats.freshness.sum())
        self.samples += len(stats.keys)
        self.max_lag = max(self.max_lag, int(stats.lag.max()))
        self.skipped_steps += skipped
