"""How far sampling may run ahead of learning: as far as the student's drift allows. Ours, not the paper's.

A score can weigh a stale sample less; it cannot make it fresh. While the student moves fast, as in its first
steps, a batch that is two steps old shows it prefixes that it no longer visits, and every step spent on them
is lost. Once it moves slowly, the same lag costs nothing. So a recipe's max_lag is only the most, and
admission follows what was measured:

    D_roll of the batch's lagged samples, above the noise floor:
        over `target`     one step less ahead
        at or under it    one step more, up to the most

A batch without lagged samples measures nothing; after `PATIENCE` such batches, one step ahead is tried again.
The recipe's bound on the lag is unchanged: running less far ahead only delays admission, and drops nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

PATIENCE = 3  # optimizer steps


@dataclass
class Ahead:
    """Steps ahead allowed `now`, which a checkpoint stores with `waited`; the rest is the recipe's."""

    most: int
    target: float | None  # nats per token; None: always the most
    waited: int = 0
    now: int = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.most if self.target is None else min(1, self.most)

    def resume(self, now: int, waited: int) -> int:
        """Continue from a checkpoint, within what the recipe says today."""
        if self.target is not None:
            self.now, self.waited = min(now, self.most), waited
        return self.now

    def update(self, lag: np.ndarray, drift: np.ndarray) -> int:
        """The steps ahead after a batch with these lags and drifts above the floor, `(samples,)` each."""
        if self.target is None:
            return self.now
        lagged = drift[lag > 0]
        if len(lagged):
            self.waited = 0
            self.now += 1 if float(lagged.mean()) <= self.target else -1
        else:
            self.waited += 1
            if self.waited >= PATIENCE:
                self.now, self.waited = max(self.now, 1), 0
        self.now = min(max(self.now, 0), self.most)
        return self.now
