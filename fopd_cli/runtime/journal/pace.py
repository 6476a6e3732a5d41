"""When a run will end, judging by how long its steps and evaluations have taken so far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

RECENT = 50  # steps that count: rollouts grow longer as a student learns
SHORT_TO_LONG = ((60, "s"), (60, "min"), (24, "h"))


@dataclass
class Pace:
    """`every` is the number of steps between evaluations; the clock is the caller's, in seconds."""

    steps: int
    every: int
    _last: tuple[int, float] | None = None
    _first_evaluation: float = 0.0
    _plain: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _evaluated: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def evaluated(self, seconds: float) -> None:
        """Note what the first evaluation after a start took; it counts until a step with one was timed."""
        if not self._first_evaluation:
            self._first_evaluation = seconds

    def step(self, step: int, now: float) -> None:
        """Step `step` is done. The first one after a start fills the pipeline, so it says nothing about
        others.
        """
        if self._last is not None:
            before, since = self._last
            during = self._evaluated if before % self.every == 0 else self._plain
            during.append((now - since) / (step - before))
        self._last = (step, now)

    def remaining(self) -> float | None:
        """Seconds to the end of the last evaluation; None while nothing is known."""
        if self._last is None or not (self._plain or self._evaluated):
            return None
        done, _ = self._last
        plain = fmean(self._plain or self._evaluated)
        more = (
            max(0.0, fmean(self._evaluated) - plain)
            if self._plain and self._evaluated
            else self._first_evaluation
        )
        evaluations = self.steps // self.every - (done - 1) // self.every
        return plain * (self.steps - done) + more * evaluations


def readable(seconds: float) -> str:
    """In the largest unit that fits: 45 s, 12 min, 3.5 h, 2.1 d."""
    value = seconds
    for size, unit in SHORT_TO_LONG:
        if value < size:
            return f"{value:.1f} {unit}" if unit == "h" else f"{value:.0f} {unit}"
        value /= size
    return f"{value:.1f} d"
