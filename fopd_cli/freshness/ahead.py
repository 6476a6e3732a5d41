"""How far sampling may run ahead of learning: as far as the student's drift allows. Ours, not the paper's.

A score can weigh a stale sample less; it cannot make it fresh. While the student moves fast, as in its first
steps, a batch that is two steps old shows it prefixes that it no longer visits, and every step spent on them
is lost. Once it moves slowly, the same lag costs nothing. So a recipe's max_lag is only the most, and
admission follows what was measured:

    d = sum D_roll / sum tau  over the batch's lagged samples, above the noise floor
    ahead <- at most the steps with  d ahead <= target,  and at most max_lag;
             one more than before, if the batch's samples are as old as `ahead` lets them be

so d is what one more step of lag brings. (On the real pair drift grew a little faster than in proportion to
the lag: 0.004, 0.013, 0.019 and 0.031 nats at lag 1 to 4. Hence no step up before the last one was seen.) A
rule that only looks at whether the drift is over the target, and goes down by a step each time, overshoots:
the samples in flight are as old as before, are over it again, and sampling stands still.

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
        if steps := int(lag.sum()):
            self.waited = 0
            a_step = float(drift[lag > 0].sum()) / steps
            held = self.most if a_step <= 0 else int(min(self.target / a_step, self.most))
            seen = int(lag.max()) >= self.now
            self.now = min(self.now + seen, held)
        else:
            self.waited += 1
            if self.waited >= PATIENCE:
                self.now, self.waited = max(self.now, 1), 0
        self.now = min(max(self.now, 0), self.most)
        return self.now
