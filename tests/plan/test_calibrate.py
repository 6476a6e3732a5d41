"""Costs that are known, found again in the spans that they make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from fopd_cli.errors import UserError
from fopd_cli.plan import calibrate
from fopd_cli.plan.calibrate import Span, carried_over, fitted, measured, undisturbed
from fopd_cli.plan.contention import Contention, places
from fopd_cli.plan.cost import Call, Costs, Decoding
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.crew import messages
from fopd_cli.runtime.crew.crew import LEARNER, Engine, sampler, teacher
from fopd_cli.runtime.journal.trace import Trace
from fopd_cli.runtime.placement import Plan, from_plain, place, to_plain

DECODING = Decoding(step=2e-3, row=1e-5, prompt_token=3e-5, load=0.02, rows=64, join=6e-3, exchange=2e-3)
TRUE = Costs(DECODING, (Call(4e-3, 5e-5),), Call(8e-3, 6e-5), publish=0.03, measuring=Call(1e-3, 2e-5))
# What arithmetic might have said: other figures, other proportions.
GUESS = Costs(
    Decoding(step=1e-4, row=2e-6, prompt_token=1e-6, load=0.5, rows=64, join=1e-3, exchange=4e-4),
    (Call(1e-3, 1e-5),),
    Call(1e-3, 2e-5),
    publish=0.5,
    measuring=Call(5e-4, 1e-5),
)


def placed(*settings: str, devices: int = 0) -> Plan:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", list(settings))
    return place(recipe, devices, cores=2)


def span(engine: Engine, kind: str, start: float, seconds: float, **args: Any) -> Span:
    return Span(engine, kind, start, start + seconds, args)


def spans_of(costs: Costs, rng: np.random.Generator, delay: float = 0.0) -> list[Span]:
    """Forty steps, one after another, none beside another."""
    found, now, d = [], 0.0, costs.decoding
    for step in range(40):
        work = {
            "passes": int(rng.integers(20, 60)),
            "rows": int(rng.integers(100, 3000)),
            "prompt_tokens": int(rng.integers(100, 900)),
            "joins": int(rng.integers(0, 9)),
            "exchanges": int(rng.integers(1, 20)),
        }
        seconds = np.dot(list(work.values()), [d.step, d.row, d.prompt_token, d.join, d.exchange])
        found.append(span(sampler(0), "generate", now, float(seconds), tokens=1, **work))
        now = found[-1].end
        for samples in (16, int(rng.integers(1, 16))):
            tokens = samples * int(rng.integers(30, 60))
            seconds = costs.scoring[0].seconds(tokens) + delay * samples
            found.append(span(teacher(0), "score", now, seconds, tokens=tokens, samples=samples))
            now = found[-1].end
        found.append(span(Engine("grader"), "grade", now, 0.016, samples=16))
        tokens = int(rng.integers(1000, 4000))
        found.append(span(LEARNER, "train", now, costs.training.seconds(tokens), step=step, tokens=tokens))
        found.append(span(LEARNER, "publish", found[-1].end, costs.publish, version=step + 1))
        now = found[-1].end + 0.011  # the conductor's
        found.append(span(sampler(0), "load", now, costs.decoding.load, version=step + 1))
        now = found[-1].end
    return found


def flat(costs: Costs) -> list[float]:
    d = costs.decoding
    calls = [*costs.scoring, costs.training]
    parts = [d.step, d.row, d.prompt_token, d.join, d.exchange, d.load, costs.publish]
    return [*parts, *(v for c in calls for v in (c.call, c.token))]


@pytest.mark.parametrize("delay", [0.0, 0.004])
def test_costs_are_found_again_in_their_spans(delay: float) -> None:
    plan = placed("placement.mode=partition", devices=3)
    found = measured(spans_of(TRUE, np.random.default_rng(0), delay), GUESS, plan, [delay], 2)
    for work in ([32, 2048, 768, 0, 1], [100, 1600, 100, 20, 30], [1, 64, 0, 0, 0]):
        seconds = [
            np.dot(work, [d.step, d.row, d.prompt_token, d.join, d.exchange])
            for d in (found.decoding, DECODING)
        ]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.1)
    for one, other in ((found.scoring[0], TRUE.scoring[0]), (found.training, TRUE.training)):
        assert [one.seconds(n) for n in (1000, 4000)] == pytest.approx(
            [other.seconds(n) for n in (1000, 4000)], rel=0.05
        )
    assert (found.decoding.load, found.publish) == pytest.approx((DECODING.load, TRUE.publish))
    assert found.grade == pytest.approx(1e-3)
    assert found.bookkeeping == pytest.approx(0.011)
    assert found.measured == {"sampler", "teacher", "learner"}
    assert found.measuring.token == pytest.approx(found.training.token / 2)  # as arithmetic relates the two


def test_a_few_spans_that_were_disturbed_change_little() -> None:
    rng = np.random.default_rng(0)
    plan = placed("placement.mode=partition", devices=3)
    spans = [
        replace(s, end=s.end + 1.0) if s.kind == "train" and i % 9 == 0 else s
        for i, s in enumerate(spans_of(TRUE, rng))
    ]
    found = measured(spans, GUESS, plan, [0.0], 2)
    assert found.training.seconds(2500) == pytest.approx(TRUE.training.seconds(2500), rel=0.05)


def test_where_spans_cannot_tell_arithmetic_has_the_proportions() -> None:
    """All spans alike: their sum is right, and its parts are as they were guessed."""
    found = fitted([[10, 1000]] * 20, [3.0] * 20, [1e-2, 1e-4])
    assert np.dot(found, [10, 1000]) == pytest.approx(3.0)
    assert found[0] * 10 == pytest.approx(found[1] * 1000, rel=0.01)


def test_no_cost_is_negative() -> None:
    found = fitted([[1, 10], [1, 20], [1, 30]], [1.0, 3.0, 5.0], [0.1, 0.1])
    assert (found >= 0).all()


def test_what_ran_beside_is_taken_out() -> None:
    """Two of three seconds alone, one beside another on two cores that are divided by need."""
    contention = Contention(places(placed("schedule.max_lag=2")), 2, spread=1.0)
    spans = [
        span(LEARNER, "train", 0.0, 3.0, tokens=1),
        span(sampler(0), "generate", 2.0, 4.0),
        span(teacher(0), "score", 2.0, 0.0),
    ]
    train, generate, _ = undisturbed(spans, contention, [0.0])
    assert train.seconds == pytest.approx(2 + 0.5)
    assert generate.seconds == pytest.approx(0.5 + 3)


def test_a_teachers_delay_is_not_its_work() -> None:
    contention = Contention(places(placed("placement.threads={sampler: 1, teacher: 1, learner: 1}")), 2, 0.0)
    (score,) = undisturbed([span(teacher(0), "score", 0.0, 1.0, samples=8)], contention, [0.1])
    assert score.seconds == pytest.approx(0.2)


def test_measured_costs_go_to_another_plan_by_the_arithmetic_of_both() -> None:
    half = replace(GUESS, decoding=replace(GUESS.decoding, step=GUESS.decoding.step / 2))
    found = carried_over(TRUE, GUESS, half)
    assert found.decoding.step == pytest.approx(TRUE.decoding.step / 2)
    assert flat(carried_over(TRUE, GUESS, GUESS)) == pytest.approx(flat(TRUE))
    two = replace(GUESS, scoring=GUESS.scoring * 2)
    known = replace(TRUE, measured=frozenset({"sampler", "teacher", "learner"}))
    several = carried_over(known, GUESS, two)  # whose seconds would they be?
    assert several.scoring == two.scoring
    assert several.measured == {"sampler", "learner"}


@pytest.mark.parametrize("devices", [0, 1, 8])
def test_a_placement_is_read_as_it_was_written(tmp_path: Path, devices: int) -> None:
    plan = placed(devices=devices)
    path = tmp_path / "placement.json"
    path.write_text(json.dumps({"cores": 3, "plan": to_plain(plan)}))
    assert calibrate.placement(tmp_path) == (plan, 3)
    assert from_plain(to_plain(plan)) == plan


@pytest.mark.parametrize("text", [None, "", "{}", '{"cores": 2, "plan": {"mode": "cpu"}}'])
def test_a_run_that_does_not_say_where_it_ran(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "placement.json").write_text(text)
    with pytest.raises(UserError, match=r"--from: .* does not say where its workers ran"):
        calibrate.placement(tmp_path)


def test_a_run_with_too_few_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few optimizer steps"):
        calibrate.spans(tmp_path, placed())


def test_publications_beside_the_next_step_are_the_learners(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for step in range(5):
        trace.add("learner-0", messages.Span("train", step, step + 0.9, {"tokens": 9}))
        publication = messages.Span("publish", step + 0.9, step + 1.2, {"version": step + 1})
        trace.add("learner-0-publisher", publication)
    found = calibrate.spans(tmp_path, placed())
    publications = [s for s in found if s.kind == "publish"]
    assert [(s.engine, s.args["version"]) for s in publications] == [(LEARNER, v) for v in range(1, 6)]
    assert [s.end - s.start for s in publications] == pytest.approx([0.3] * 5)
