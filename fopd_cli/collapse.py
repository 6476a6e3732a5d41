"""Whether a run has collapsed, by the paper's definition: the final score is more than 40% below the peak,
and every score in the last tenth of training is below 90% of the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FINAL_UNDER = 0.6  # of the peak
TAIL_UNDER = 0.9  # of the peak
TAIL = 0.1  # of training


@dataclass(frozen=True)
class Collapse:
    """`drop` is peak minus final score."""

    peak: float
    drop: float
    collapsed: bool


def collapse(curve: Sequence[tuple[int, float]], steps: int) -> Collapse:
    """`curve`: (optimizer step, score) pairs in order, at least one. `steps`: the length of training."""
    scores = [score for _, score in curve]
    peak, final = max(scores), scores[-1]
    tail = [score for step, score in curve if step >= (1 - TAIL) * steps] or [final]
    collapsed = final < FINAL_UNDER * peak and all(score < TAIL_UNDER * peak for score in tail)
    return Collapse(peak, peak - final, collapsed)
