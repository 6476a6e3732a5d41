"""The predicted end of a run, after a tenth of it."""

from __future__ import annotations

import random

import pytest

from fopd_cli.runtime.journal.pace import Pace, readable


def told(steps: int, every: int, seed: int) -> tuple[float, float]:
    """A run with uneven steps, slow evaluations and a pipeline to fill: the prediction at a tenth, and the
    truth.
    """
    rng = random.Random(seed)
    pace, now, said, at = Pace(steps, every), 20.0, 0.0, 0.0
    pace.evaluated(20.0)
    for step in range(1, steps + 1):
        now += (
            rng.uniform(2, 6)
            + (25.0 if step == 1 else 0)
            + (20.0 if (step - 1) % every == 0 and step > 1 else 0)
        )
        pace.step(step, now)
        if step == steps // 10:
            said, at = pace.remaining() or 0.0, now
    now += 20.0  # the last evaluation
    return said, now - at


@pytest.mark.parametrize(("steps", "every"), [(400, 50), (200, 10), (1000, 1000)])
def test_a_tenth_of_the_run_tells_the_rest_within_a_fifth(steps: int, every: int) -> None:
    for seed in range(20):
        said, truth = told(steps, every, seed)
        assert abs(said - truth) < 0.2 * truth


def test_nothing_is_said_before_anything_is_known() -> None:
    pace = Pace(10, 5)
    assert pace.remaining() is None
    pace.step(4, 100.0)  # the first after a resume
    assert pace.remaining() is None
    pace.step(5, 110.0)
    assert pace.remaining() == 50.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (125, "2 min"), (5400, "1.5 h"), (90 * 3600, "3.8 d")]
)
def test_readable(seconds: float, text: str) -> None:
    assert readable(seconds) == text
