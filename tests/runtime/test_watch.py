"""Warnings while a run goes wrong."""

from __future__ import annotations

import numpy as np

from fopd_cli.runtime.journal.watch import WINDOW, Watch


def said(watch: Watch, norms: list[float], kls: list[float]) -> list[str]:
    return [text for norm, kl in zip(norms, kls, strict=True) for text in watch.step(norm, kl, [kl] * 4)]


def test_a_threshold_that_always_acts_is_named_once() -> None:
    found = said(Watch(1.0), [2.0] * 3 * WINDOW, [0.5] * 3 * WINDOW)
    assert len(found) == 1
    assert "learner.clip: all of the last 20 gradients were clipped to 1 (norms 2 to 2)" in found[0]


def test_a_guard_against_spikes_is_left_alone() -> None:
    norms = [0.5] * (WINDOW - 1) + [9.0]
    assert said(Watch(1.0), norms * 3, [0.5] * 3 * WINDOW) == []
    assert said(Watch(0.0), [9.0] * 3 * WINDOW, [0.5] * 3 * WINDOW) == []


def test_a_kl_that_climbs_is_told_and_noise_is_not() -> None:
    falling = [1.0 / (1 + i) + 0.4 for i in range(2 * WINDOW)]
    assert said(Watch(0.0), [1.0] * 2 * WINDOW, falling) == []
    climbing = falling + [0.4 + 0.05 * i for i in range(2 * WINDOW)]
    found = said(Watch(0.0), [1.0] * 4 * WINDOW, climbing)
    assert len(found) == 1
    assert "the KL to the teacher climbs" in found[0]
    assert said(Watch(0.0), [1.0] * 4 * WINDOW, [0.002] * 2 * WINDOW + [0.006] * 2 * WINDOW) == []
    assert said(Watch(0.0), [1.0] * WINDOW, [float("nan")] * WINDOW) == []


def test_a_student_that_leaves_its_samples_is_told_early() -> None:
    """The training KL of a collapsing run of the real pair (docs/staleness-details.md): its 20 steps."""
    collapsing = [2.37, 2.28, 1.49, 0.8, 1.12, 0.22, -1.24, -3.35, -4.93, -2.77, -3.06, -3.5, -4.83, -4.77]
    watch = Watch(0.0)
    found = [watch.step(1.0, kl, [kl] * 4) for kl in collapsing]
    (when,) = (step for step, texts in enumerate(found) if texts)
    assert when == 8
    assert "finds its own samples less likely than the teacher does (log-ratio -1.6 nats" in found[when][0]
    assert said(Watch(0.0), [1.0] * WINDOW, [-0.1] * WINDOW) == [], (
        "noise around zero of a student that is done"
    )


def test_a_student_that_falls_silent_is_told_from_one_that_learns() -> None:
    """KL by quarter of two runs of the real pair (docs/real-pair.md), and figures of toy runs that are nearly
    done.
    """
    for quarters, uneven in (
        ([1.63, 0.46, 0.31, 0.27], True),
        ([0.96, 0.89, 0.88, 0.67], False),
        ([0.015, 0.001, 0.001, 0.0004], False),
        ([float("nan")] * 4, False),
    ):
        watch = Watch(0.0)
        found = [
            text for _ in range(2 * WINDOW) for text in watch.step(1.0, float(np.mean(quarters)), quarters)
        ]
        assert len(found) == uneven
        assert not found or "1.6 nats per token in their first quarter, 0.27 in their last" in found[0]
