"""The conductor with engines that do no work, on a virtual clock: whenever things end and whichever engines
are lost, every sample is accounted for and none is too old.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from fopd_cli.inputs import Inputs, load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.inprocess import InProcess
from fopd_cli.runtime.crew.pretend import Pretend
from fopd_cli.runtime.crew.ranks import Calls
from fopd_cli.runtime.crew.roles import Grading
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.saving import Unsaved
from fopd_cli.runtime.journal.sinks import Recorded, Records
from fopd_cli.runtime.memory.arena import aligned
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State

STEPS = 12
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


class Random:
    """Everything takes a random time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> list[float]:
        return [now + self.rng.choice([0.0, 1.0, self.rng.uniform(0, 20)]) for _ in answers]

    def stopped(self, now: float, engine: Engine) -> None:
        pass


class Unreliable(InProcess):
    """Now and then an engine is lost with all its work in progress, and comes back later."""

    def __init__(self, rng: random.Random, losses: float) -> None:
        super().__init__(Pretend(), Random(rng))
        self.rng, self.losses = rng, losses
        self.known: set[Engine] = set()
        self.down: set[Engine] = set()

    def send(self, engine: Engine, command: m.Command) -> None:
        self.known.add(engine)
        if engine not in self.down:
            super().send(engine, command)

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        for engine, event in super().receive():
            if isinstance(event, m.EngineBack):
                self.down.discard(engine)
            yield engine, event
        up = sorted((e for e in self.known - self.down if e.role != "learner"), key=str)
        if up and self.rng.random() < self.losses:
            engine = self.rng.choice(up)
            self._events = [e for e in self._events if e[2] != engine]
            heapq.heapify(self._events)
            self.down.add(engine)
            yield engine, m.EngineLost("gone", restarted=True)
            # commands wait for an environment that is starting
            away = 0.0 if engine.role == "environment" else self.rng.uniform(0, 30)
            self._happens(self.now + away, engine, m.EngineBack())
            if engine.role == "environment":
                self.down.discard(engine)


def inputs(recipe: Path, *overrides: str) -> Inputs:
    small = ["learner.batch_samples=8", "sampler.concurrency=6", "teacher.batch_samples=3", "eval.samples=1"]
    parsed = load_recipe(recipe, [*small, f"learner.steps={STEPS}", "eval.every=4", *overrides])
    return load_inputs(parsed, place(parsed, 0))


def conducted(found: Inputs, seed: int, losses: float = 0.0) -> tuple[State, Recorded]:
    """A whole run; checks what must hold for any run."""
    state, records = State(found), Recorded()
    crew = Unreliable(random.Random(seed), losses)
    with Journal(found.recipe, found.tokenizer, lambda *_: records, quiet=True) as journal:
        Conductor(state, crew, journal, Unsaved(), Signals(journal.say)).run()
    assert [r["step"] for r in records.metrics.kind("step")] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records.metrics.kind("eval")] == [0, 4, 8, STEPS]
    assert max(r["lag_max"] for r in records.metrics.kind("step")) <= found.recipe.max_lag
    check_ledger(state, records)
    check_buffer(state)
    return state, records


def check_ledger(state: State, records: Recorded) -> None:
    counts = state.schedule.counts
    trained, refreshed = ([i for r in records.ledger for i in r.get(k, [])] for k in ("trained", "refreshed"))
    assert len(set(trained)) == len(trained) == counts["trained"] == STEPS * state.schedule.config.batch
    assert len(refreshed) == counts["refreshed"]
    assert counts["drawn"] == len(trained) + len(refreshed) + state.schedule.in_flight


def check_buffer(state: State) -> None:
    """The remaining entries and memory belong to samples in flight."""
    entries = state.buffer.entries
    assert entries.keys() <= state.schedule.tickets.keys()
    sizes = [
        state.buffer.specs[e.teacher].nbytes(e.rollout.response_length) for e in entries.values() if e.region
    ]
    assert state.buffer.arena.used_bytes == sum(map(aligned, sizes))


@pytest.fixture(scope="module")
def ahead() -> Inputs:
    return inputs(
        QUICKSTART,
        "task.eval_prompts=8",
        "schedule.max_lag=3",
        "freshness.max_drift=null",
        "placement.sampler=2",
    )


@pytest.mark.parametrize("seed", range(6))
def test_whoever_is_lost_every_sample_is_trained_on_once(ahead: Inputs, seed: int) -> None:
    conducted(ahead, seed)
    conducted(ahead, seed, losses=0.2)


class SlowLearner(Random):
    """Nothing else takes any time, so that a next batch is there whenever a step ends."""

    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> list[float]:
        return [now + (engine.role == "learner") for _ in answers]


class Noted(InProcess):
    """Notes who was told to go on, and with which version."""

    def __init__(self, notes: list[tuple[str, int]]) -> None:
        super().__init__(Pretend(), SlowLearner(random.Random(0)))
        self.notes = notes

    def send(self, engine: Engine, command: m.Command) -> None:
        if isinstance(command, m.TrainCommand):
            self.notes.append(("learner", command.step))
        elif isinstance(command, m.LoadCommand):
            self.notes.append((f"sampler {engine.index}", command.version))
        super().send(engine, command)


def test_at_the_end_of_a_step_everyone_goes_on_before_it_is_written_down(ahead: Inputs) -> None:
    notes: list[tuple[str, int]] = []

    class Metrics(Records):
        def write(self, record: dict[str, Any]) -> None:
            notes.append((record["kind"], record["step"]))
            super().write(record)

    records = Recorded()
    records.metrics = Metrics()
    with Journal(ahead.recipe, ahead.tokenizer, lambda *_: records, quiet=True) as journal:
        Conductor(State(ahead), Noted(notes), journal, Unsaved(), Signals(journal.say)).run()
    for step in range(1, STEPS):
        written = notes.index(("step", step))
        assert notes.index(("sampler 0", step)) < written
        assert notes.index(("sampler 1", step)) < written
        if step % 4:  # else the learner evaluates first
            assert notes.index(("learner", step)) < written


def test_a_refresh_lets_go_of_all_that_is_not_trained_on() -> None:
    found = inputs(
        QUICKSTART,
        "task.eval_prompts=8",
        "schedule.max_lag=3",
        "freshness.policy=fixed_refresh",
        "freshness.refresh.every=5",
    )
    for seed in range(3):
        state, _ = conducted(found, seed, losses=0.1)
        assert state.schedule.refreshes == 2
        assert state.schedule.counts["refreshed"] > 0


def test_episodes_whose_sampler_or_environment_is_lost_are_held_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = inputs(ROOT / "benchmarks" / "recipes" / "middle.yaml", "schedule.max_lag=2")
    conducted(found, 0)
    conducted(found, 0, losses=0.2)


def test_at_a_fixed_lag_the_order_of_arrival_says_nothing(ahead: Inputs) -> None:
    found = inputs(QUICKSTART, "task.eval_prompts=8", "schedule.lag=2")
    _, first = conducted(found, 0)
    for seed in (1, 2):
        _, other = conducted(found, seed, losses=0.1)
        assert other.ledger == first.ledger


def test_what_nobody_knows_is_refused(ahead: Inputs) -> None:
    """An action, event or command that was added but not handled is not mistaken for another one."""
    journal = Journal(ahead.recipe, ahead.tokenizer, lambda *_: Recorded(), quiet=True)
    crew = InProcess(Pretend(), Random(random.Random(0)))
    conductor: Any = Conductor(State(ahead), crew, journal, Unsaved(), Signals(journal.say))
    with pytest.raises(AssertionError, match="StopCommand"):
        conductor._start(m.StopCommand())
    with pytest.raises(AssertionError, match="StopCommand"):
        conductor._handle(Engine("learner"), m.StopCommand())
    unknown: Any = m.StopCommand()
    for role in (Grading.__new__(Grading), Pretend()):
        with pytest.raises(AssertionError, match="StopCommand"):
            role.do(unknown) if isinstance(role, Grading) else role.do(Engine("grader"), unknown)


def test_ranks_answer_as_one_when_the_last_has_answered() -> None:
    calls, span = Calls(2), m.Span("score", 0, 0)
    calls.asked()
    calls.asked()
    assert calls.answered(1, m.Scored([2], span)) is None
    assert calls.answered(1, m.Scored([4], span)) is None, "already at the next call"
    assert calls.answered(0, m.Scored([1], span)) == m.Scored([1], span), "rank 0's counts"
    assert calls.answered(0, m.Scored([3], span)) == m.Scored([3], span)
    calls.asked()
    assert calls.answered(0, m.Saved({"step": 1}, span)) is None
    whole = calls.answered(1, m.Saved({}, span, error="no space left"))
    assert isinstance(whole, m.Saved)
    assert (whole.extra, whole.error) == ({"step": 1}, "no space left")
