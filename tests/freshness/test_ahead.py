"""How far ahead sampling may run, by the drift that was measured."""

from __future__ import annotations

import numpy as np

from fopd_cli.freshness.ahead import PATIENCE, Ahead


def batch(lag: int, drift: float) -> tuple[np.ndarray, np.ndarray]:
    """Some samples of this lag and drift, and a fresh one."""
    return np.array([0, lag, lag]), np.array([0.0, drift, drift])


def test_it_begins_one_step_ahead_and_follows_the_drift_of_a_step() -> None:
    ahead = Ahead(most=4, target=0.1)
    assert ahead.now == 1
    seen = [(1, 0.01), (1, 0.01), (2, 0.02), (3, 0.03), (4, 0.04), (4, 0.12), (4, 0.24), (1, 0.2), (1, -0.01)]
    assert [ahead.update(*batch(*one)) for one in seen] == [2, 2, 3, 4, 4, 3, 1, 0, 1]


def test_samples_that_are_as_old_as_before_do_not_push_it_further_down() -> None:
    """Four steps old, they have drifted by 0.12: 0.03 a step, so three steps stay under 0.1."""
    ahead = Ahead(most=4, target=0.1)
    ahead.now = 4
    assert [ahead.update(*batch(4, 0.12)) for _ in range(5)] == [3] * 5
    assert [ahead.update(*batch(3, 0.09)) for _ in range(5)] == [3] * 5


def test_a_mixed_batch_counts_by_the_lag_of_its_samples() -> None:
    lag, drift = np.array([0, 1, 3]), np.array([5.0, 0.02, 0.10])
    ahead = Ahead(most=9, target=0.1)
    ahead.now = 9
    assert ahead.update(lag, drift) == 3


def test_with_nothing_to_measure_one_step_ahead_is_tried_now_and_then() -> None:
    ahead = Ahead(most=3, target=0.1)
    assert ahead.update(*batch(1, 5.0)) == 0
    assert [ahead.update(*batch(0, 0.0)) for _ in range(PATIENCE + 1)] == [0] * (PATIENCE - 1) + [1, 1]


def test_without_a_target_or_with_max_lag_zero_there_is_nothing_to_follow() -> None:
    assert [Ahead(4, None).update(*batch(1, 9.0)), Ahead(0, 0.1).update(*batch(0, 0.0))] == [4, 0]


def test_a_checkpoint_goes_on_within_what_the_recipe_says_today() -> None:
    assert Ahead(4, 0.1).resume(now=3, waited=0) == 3
    assert Ahead(2, 0.1).resume(now=3, waited=0) == 2
    assert Ahead(4, None).resume(now=0, waited=2) == 4
