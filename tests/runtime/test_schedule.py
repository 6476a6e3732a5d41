"""The schedule on a virtual clock: real decisions, simulated durations, no processes."""

from __future__ import annotations

import contextlib
import heapq
import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fopd_cli.runtime.memory.sizes import SMALLEST_BATCHES
from fopd_cli.runtime.scheduling.schedule import Schedule
from fopd_cli.runtime.scheduling.tickets import (
    Evaluate,
    Generate,
    Lease,
    Load,
    Reexecute,
    ScheduleConfig,
    Score,
    State,
    Train,
)
from fopd_cli.samples import SampleId


def config(**changes: Any) -> ScheduleConfig:
    values: dict[str, Any] = {
        "steps": 6,
        "batch": 4,
        "max_lag": 2,
        "lag": None,
        "inflight": "wait",
        "replicas": 1,
        "concurrency": 8,
        "score_batch": (2,),
        "exclusive": False,
        "eval_versions": frozenset(),
    }
    return ScheduleConfig(**{**values, **changes})


def stream(number: int) -> SampleId:
    return SampleId("train", 0, number, 0)


class Simulator:
    """Stands in for the conductor and its workers; every duration is drawn from `rng`."""

    def __init__(
        self,
        cfg: ScheduleConfig,
        seed: int = 0,
        durations: dict[str, tuple[float, float]] | None = None,
        evals: int = 0,
        refresh_every: int = 0,
        arena: int | None = None,
        faults: int = 0,
        less_ahead: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.durations = {
            "sample": (0.1, 5.0),
            "score": (0.1, 1.0),
            "train": (0.5, 2.0),
            "publish": (0.0, 3.0),
            "load": (0.0, 0.3),
            "reexecute": (0.0, 2.0),
            "fault": (0.0, 30.0),
            "restart": (0.1, 4.0),
            **(durations or {}),
        }
        self.arena, self.held, self.less_ahead = arena, 0, less_ahead
        self.schedule = Schedule(
            cfg,
            stream,
            [SampleId("eval", 0, i, 0) for i in range(evals)],
            self._reserve,
            self._release,
            lambda sample: sample.prompt % len(cfg.score_batch),
        )
        self.lives: Counter[tuple[str, int]] = (
            Counter()
        )  # how often each engine was lost: what it owed never comes
        self.clock, self.events, self.order = 0.0, [], 0
        self.sampled_with: dict[
            int, list[str]
        ] = {}  # the group of each sample's last sampling, and of its scoring
        self.scored_with: dict[int, list[str]] = {}
        self.consumed: dict[int, list[Any]] = {}  # what each step took: sample, version, both groups
        self.reexecuted: list[str] = []
        self.reexecutions: Counter[int] = Counter()  # as of a step
        self.ahead = 0  # re-executions while a step was under way
        self.overlapped = 0  # steps that began while the version before was being published
        self.updating: Any = None  # a step that has all its gradients, and waits for that
        self.lags: list[int] = []
        self.steps: list[tuple[float, tuple[str, ...]]] = []
        self.evaluated: Counter[int] = Counter()
        self.trained: list[str] = []
        self.refresh_every = refresh_every
        self.scoring: list[dict[int, tuple[int, ...]]] = [{} for _ in cfg.score_batch]
        self.calls = 0
        self.evictions = 0
        self.busy: dict[str, list[tuple[float, float]]] = {"sample": [], "score": [], "train": []}
        for _ in range(faults):
            self.after("fault", self.fault)

    def _reserve(self, keys: tuple[int, ...]) -> bool:
        if self.arena is not None and self.held + len(keys) > self.arena:
            return False
        self.held += len(keys)
        return True

    def _release(self, key: int) -> None:
        self.held -= 1
        self.evictions += 1

    def after(self, what: str, call: Any) -> None:
        duration = self.rng.uniform(*self.durations[what])
        if what in self.busy:
            self.busy[what].append((self.clock, self.clock + duration))
        heapq.heappush(self.events, (self.clock + duration, self.order, call))
        self.order += 1

    def from_engine(self, role: str, index: int, what: str, call: Any) -> None:
        """An answer that comes only if its engine lives that long."""
        life = self.lives[role, index]
        self.after(what, lambda: call() if self.lives[role, index] == life else None)

    def fault(self) -> None:
        """One sampler or teacher dies; it comes back after a while."""
        s = self.schedule
        role, engines = self.rng.choice(
            [("sampler", s.replicas), ("teacher", s.teachers), ("environment", [])]
        )
        if role == "environment":
            self.lives[role, 0] += 1
            s.on_environment_lost()
            return
        index = self.rng.randrange(len(engines))
        if not engines[index].up:
            return
        self.lives[role, index] += 1
        if role == "sampler":
            s.on_sampler_lost(index)
            self.after("restart", lambda: s.on_sampler_back(index))
        else:
            scoring = sum(len(keys) for keys in self.scoring[index].values())
            assert len(s.on_teacher_lost(index)) <= scoring
            self.held -= scoring
            self.scoring[index].clear()
            self.after("restart", lambda: s.on_teacher_back(index))

    def run(self) -> Simulator:
        s = self.schedule
        s.on_learner_ready()
        for _ in range(200_000):
            while actions := s.actions():
                for action in actions:
                    self.start(action)
            if s.done:
                return self
            assert self.events, f"deadlock at step {s.step}: {[(t.key, t.state) for t in s.tickets.values()]}"
            self.clock, _, call = heapq.heappop(self.events)
            call()
        raise AssertionError("does not end")

    def start(self, action: Any) -> None:
        s = self.schedule
        match action:
            case Generate(replica, keys):
                self.sampled_with.update(dict.fromkeys(keys, self.names(keys)))
                for key in keys:
                    version = s.replicas[replica].loaded
                    self.from_engine(
                        "sampler",
                        replica,
                        "sample",
                        lambda r=replica, k=key, v=version: self.sampled(r, k, v),
                    )
            case Load(replica, version):
                assert version <= s.step
                assert version >= s.step - 1, "its slot may be overwritten"
                assert version <= s.published, "its slot is not complete"
                training = any(t.state is State.TRAINING for t in s.tickets.values())
                assert version == s.step or not training, "the step under way writes over it"
                self.from_engine("sampler", replica, "load", lambda: s.on_loaded(replica, version))
            case Reexecute(keys, now):
                for key in keys:
                    assert now - s.tickets[key].version >= s.config.reexecute_min_lag
                    if s.config.reexecute_ahead:
                        training = any(t.state is State.TRAINING for t in s.tickets.values())
                        assert now == s.step - 1 + training
                        self.ahead += training
                    else:
                        assert now == s.step
                        assert not s.learner_busy
                    self.reexecutions[now] += 1
                    changed = key % 3 == 0
                    self.from_engine(
                        "environment", 0, "reexecute", lambda k=key, c=changed: self.looked_at(k, c)
                    )
            case Score(teacher, keys, again):
                assert {s.tickets[k].teacher for k in keys} == {teacher}
                self.calls += 1
                if not again:
                    self.scored_with.update(dict.fromkeys(keys, self.names(keys)))
                self.scoring[teacher][self.calls] = keys
                self.from_engine("teacher", teacher, "score", lambda c=self.calls: self.scored(teacher, c))
            case Train(step, keys):
                assert all(r.loading is None or r.loading >= step for r in s.replicas)
                self.overlapped += s.publishing
                self.lags += [step - s.tickets[k].version for k in keys]
                self.trained += [str(s.tickets[k].sample) for k in keys]
                assert not any(s.tickets[k].state in (State.REEXECUTING, State.REEXECUTED) for k in keys)
                self.consumed[step] = [self.account(k) for k in keys]
                self.steps.append((self.clock, tuple(str(s.tickets[k].sample) for k in keys)))
                self.after("train", lambda: self.finish_step(step, keys))
            case Evaluate(version, keys):
                self.evaluated[version] += len(keys)
                self.after("train", lambda: self.finish_measure(version, keys))
            case Lease(_, waker):
                s.on_leased(waker)

    def account(self, key: int) -> Any:
        """A sample's history: everything that its bits depend on."""
        ticket = self.schedule.tickets[key]
        return (
            str(ticket.sample),
            ticket.version,
            ticket.reexecuted,
            self.sampled_with[key],
            self.scored_with[key],
        )

    def names(self, keys: tuple[int, ...]) -> list[str]:
        return [str(self.schedule.tickets[k].sample) for k in keys]

    def looked_at(self, key: int, changed: bool) -> None:
        if key in self.schedule.tickets:
            self.reexecuted.append(str(self.schedule.tickets[key].sample))
        self.schedule.on_reexecuted(key, changed)

    def scored(self, teacher: int, call: int) -> None:
        self.held -= len(self.schedule.on_scored(teacher, self.scoring[teacher].pop(call)))

    def sampled(self, replica: int, key: int, version: int) -> None:
        if self.schedule.on_sampled(replica, key, version):
            self.schedule.on_graded(key)

    def finish_measure(self, version: int, keys: tuple[int, ...]) -> None:
        self.held -= len(keys)
        self.schedule.on_evaluated(version, keys)

    def published(self, version: int) -> None:
        self.schedule.on_published(version)
        if (update := self.updating) is not None:
            self.updating = None
            update()

    def finish_step(self, step: int, keys: tuple[int, ...]) -> None:
        """No weight changes before the version before is published."""
        if self.schedule.publishing:
            self.updating = lambda: self.finish_step(step, keys)
            return
        slots = [r.loading % 2 for r in self.schedule.replicas if r.loading is not None]
        assert (step + 1) % 2 not in slots, "a sampler reads the slot that is written from now on"
        self.after("publish", lambda: self.published(step + 1))
        self.held -= len(keys)
        if self.less_ahead:
            self.schedule.ahead = self.rng.randint(0, self.schedule.config.max_lag)
        self.schedule.on_trained(step, dict.fromkeys(keys, "trained"))
        if (
            self.refresh_every
            and (step + 1) % self.refresh_every == 0
            and step + 1 < self.schedule.config.steps
        ):
            held = (State.SCORED, State.REEXECUTING, State.REEXECUTED)
            scored = sum(t.state in held for t in self.schedule.tickets.values())
            self.held -= scored
            self.schedule.refresh()


def accounts(s: Schedule) -> None:
    c = s.counts
    assert c["drawn"] == c["trained"] + c["gated"] + c["refreshed"] + s.in_flight


@example(  # the first held-out sample came in last, into an arena full of later ones
    max_lag=0,
    batch=1,
    replicas=1,
    concurrency=5,
    score_batch=1,
    inflight="keep",
    exclusive=False,
    evals=5,
    refresh=0,
    arena=True,
    faults=0,
    teachers=1,
    reexecutions=0,
    ahead=False,
    less=False,
    seed=0,
)
@settings(max_examples=150, deadline=None)
@given(
    max_lag=st.integers(0, 5),
    batch=st.integers(1, 6),
    replicas=st.integers(1, 3),
    concurrency=st.integers(1, 9),
    score_batch=st.integers(1, 5),
    inflight=st.sampled_from(["keep", "wait"]),
    exclusive=st.booleans(),
    evals=st.integers(0, 7),
    refresh=st.sampled_from([0, 2, 3]),
    arena=st.booleans(),
    faults=st.integers(0, 4),
    teachers=st.integers(1, 2),
    reexecutions=st.integers(0, 3),
    ahead=st.booleans(),
    less=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_lag_is_bounded_and_accounts_are_exact(
    max_lag: int,
    batch: int,
    replicas: int,
    concurrency: int,
    score_batch: int,
    inflight: Any,
    exclusive: bool,
    evals: int,
    refresh: int,
    arena: bool,
    faults: int,
    teachers: int,
    reexecutions: int,
    ahead: bool,
    less: bool,
    seed: int,
) -> None:
    """For all durations, deaths and run-aheads: it ends, no sample is older than max_lag, and none is trained
    twice or lost.
    """
    cfg = config(
        max_lag=max_lag,
        batch=batch,
        replicas=replicas,
        concurrency=concurrency,
        score_batch=(score_batch,) * teachers,
        inflight=inflight,
        exclusive=exclusive,
        eval_versions=frozenset({0, 3, 6}),
        reexecutions=reexecutions,
        reexecute_ahead=ahead,
    )
    sim = Simulator(
        cfg,
        seed,
        evals=evals,
        refresh_every=refresh,
        arena=SMALLEST_BATCHES * batch if arena else None,
        faults=faults,
        less_ahead=less,
    ).run()
    assert max(sim.lags) <= max_lag
    assert len(sim.trained) == len(set(sim.trained)) == 6 * batch
    accounts(sim.schedule)
    assert sim.schedule.in_flight == 0
    assert sim.held == 0
    assert faults or sim.evictions or not sim.reexecutions or max(sim.reexecutions.values()) <= reexecutions
    if evals:
        assert sim.evaluated == {0: evals, 3: evals, 6: evals}


def test_less_ahead_admits_less() -> None:
    """One batch at a time, all of it fresh, although max_lag would allow two more."""
    s = Schedule(config(max_lag=2, batch=4, concurrency=100), stream, [])
    s.ahead = 0
    s.on_learner_ready()
    assert s.actions() == [Load(0, 0)]
    s.on_loaded(0, 0)
    assert s.actions() == [Generate(0, (0, 1, 2, 3))]
    s.ahead = 1
    assert s.actions() == [Generate(0, (4, 5, 6, 7))]


@settings(max_examples=200, deadline=None)
@example(  # lost after its twin had moved on
    lag=3,
    batch=5,
    replicas=2,
    concurrency=8,
    score_batch=2,
    teachers=1,
    exclusive=False,
    evals=0,
    arena=False,
    faults=2,
    reexecutions=0,
    ahead=False,
    seed=183,
)
@example(  # an evaluation while the arena is full of targets for later steps
    lag=4,
    batch=4,
    replicas=1,
    concurrency=8,
    score_batch=2,
    teachers=1,
    exclusive=False,
    evals=4,
    arena=True,
    faults=0,
    reexecutions=0,
    ahead=False,
    seed=0,
)
@given(
    lag=st.integers(0, 5),
    batch=st.integers(1, 5),
    replicas=st.integers(1, 3),
    concurrency=st.integers(1, 9),
    score_batch=st.integers(1, 6),
    teachers=st.integers(1, 3),
    exclusive=st.booleans(),
    evals=st.integers(0, 7),
    arena=st.booleans(),
    faults=st.integers(0, 3),
    reexecutions=st.integers(0, 3),
    ahead=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_fixed_lag_is_exact_and_ends(
    lag: int,
    batch: int,
    replicas: int,
    concurrency: int,
    score_batch: int,
    teachers: int,
    exclusive: bool,
    evals: int,
    arena: bool,
    faults: int,
    reexecutions: int,
    ahead: bool,
    seed: int,
) -> None:
    """For all durations and deaths, and with the smallest possible arena."""
    cfg = config(
        lag=lag,
        batch=batch,
        replicas=replicas,
        concurrency=concurrency,
        score_batch=(score_batch,) * teachers,
        steps=9,
        exclusive=exclusive,
        eval_versions=frozenset({0, 2, 4, 9}),
        reexecutions=reexecutions,
        reexecute_ahead=ahead,
    )
    room = SMALLEST_BATCHES * batch if arena else None
    sim = Simulator(cfg, seed, evals=evals, arena=room, faults=faults).run()
    expected = [step - max(0, step - lag) for step in range(9) for _ in range(batch)]
    assert sim.lags == expected
    assert sim.held == 0
    accounts(sim.schedule)
    if evals:
        assert sim.evaluated == dict.fromkeys((0, 2, 4, 9), evals)
    # The first samples of every window whose world has moved on since; a loss may make it look twice.
    windows = range(1 + ahead, 9) if lag > ahead else ()
    wanted = {str(stream(t * batch + i)) for t in windows for i in range(min(reexecutions, batch))}
    assert set(sim.reexecuted) == wanted
    assert len(sim.reexecuted) == len(wanted) or faults or sim.evictions


class Killed(Exception):
    """The process is gone; only the last checkpoint is left."""


class KilledSimulator(Simulator):
    """Saves at some steps and, like Ctrl-C, in between; dies at one event, and continues from the save."""

    def __init__(self, cfg: ScheduleConfig, seed: int, die_at: int, **options: Any) -> None:
        super().__init__(cfg, seed, **options)
        self.die_at, self.events_seen, self.saved = die_at, 0, json.dumps(self.schedule.state_dict())

    def start(self, action: Any) -> None:
        self.events_seen += 1
        if self.events_seen == self.die_at:
            if not self.schedule.learner_busy and self.rng.random() < 0.5:
                self.save()
            raise Killed
        super().start(action)

    def finish_step(self, step: int, keys: tuple[int, ...]) -> None:
        super().finish_step(step, keys)
        if self.rng.random() < 0.4:
            self.save()

    def save(self) -> None:
        state = self.schedule.state_dict()
        assert self.schedule.step - 1 <= state["resume_version"] <= self.schedule.step, (
            "two slots hold no other"
        )
        self.saved = json.dumps(state)

    def run(self) -> KilledSimulator:
        with contextlib.suppress(Killed):
            super().run()
            return self
        following = KilledSimulator(
            self.schedule.config,
            self.rng.randrange(10**6),
            -1,
            arena=self.arena,
            refresh_every=self.refresh_every,
        )
        following.schedule.eval_ids = self.schedule.eval_ids
        following.schedule.load_state_dict(json.loads(self.saved))
        following.held = sum(t.state is State.SCORED for t in following.schedule.tickets.values())
        assert self.arena is None or following.held <= self.arena
        done = following.schedule.step
        for made in ("sampled_with", "scored_with"):
            getattr(following, made).update(getattr(self, made))
        following.consumed.update({k: v for k, v in self.consumed.items() if k < done})
        return following.run()


@settings(max_examples=200, deadline=None)
@given(
    lag=st.sampled_from([None, 0, 1, 2, 3, 5]),
    batch=st.integers(1, 6),
    replicas=st.integers(1, 3),
    concurrency=st.integers(1, 7),
    score_batch=st.integers(1, 6),
    teachers=st.integers(1, 2),
    exclusive=st.booleans(),
    evals=st.integers(0, 7),
    arena=st.booleans(),
    refresh=st.sampled_from([0, 3]),
    reexecutions=st.integers(0, 2),
    ahead=st.booleans(),
    die_at=st.integers(1, 120),
    faults=st.sampled_from([0, 0, 2]),
    seed=st.integers(0, 10**6),
)
def test_killed_at_any_moment_it_computes_the_same(
    lag: int | None,
    batch: int,
    replicas: int,
    concurrency: int,
    score_batch: int,
    teachers: int,
    exclusive: bool,
    evals: int,
    arena: bool,
    refresh: int,
    reexecutions: int,
    ahead: bool,
    die_at: int,
    faults: int,
    seed: int,
) -> None:
    """max_lag 0 or a fixed lag: every step takes the same samples, of the same versions, sampled and scored
    in the same groups.
    """
    cfg = config(
        max_lag=0,
        lag=lag,
        batch=batch,
        replicas=replicas,
        concurrency=concurrency,
        score_batch=(score_batch,) * teachers,
        steps=8,
        exclusive=exclusive,
        eval_versions=frozenset({0, 3, 8}),
        reexecutions=reexecutions,
        reexecute_ahead=ahead,
    )
    options: dict[str, Any] = {"evals": evals, "arena": SMALLEST_BATCHES * batch if arena else None}
    whole = Simulator(cfg, seed, refresh_every=refresh, **options).run()
    killed = KilledSimulator(cfg, seed + 1, die_at, refresh_every=refresh, faults=faults, **options).run()
    known = 2 if faults else 5  # an engine that was lost does the rest of its group by itself
    assert {k: [s[:known] for s in v] for k, v in killed.consumed.items()} == {
        k: [s[:known] for s in v] for k, v in whole.consumed.items()
    }
    accounts(killed.schedule)


@pytest.mark.parametrize("lag", [None, 4])
def test_reexecutions_ahead_do_not_hold_the_learner(lag: int | None) -> None:
    """The learner is slowest: its next batch is reexecuted while it works."""
    times = {
        "sample": (0.1, 0.5),
        "score": (0.1, 0.1),
        "train": (4.0, 4.0),
        "publish": (0.0, 0.0),
        "load": (0.0, 0.0),
        "reexecute": (1.0, 2.0),
    }
    base: dict[str, Any] = {"max_lag": 4, "lag": lag, "steps": 12, "score_batch": (4,)}
    without = Simulator(config(**base), durations=times).run()
    before, ahead = (
        Simulator(config(**base, reexecutions=2, reexecute_ahead=flag), durations=times).run()
        for flag in (False, True)
    )
    assert before.clock > without.clock + 10
    assert ahead.clock < without.clock + 2
    assert ahead.ahead >= 16
    assert len(set(before.reexecuted)) >= len(set(ahead.reexecuted)) >= 16


@settings(max_examples=30, deadline=None)
@given(lag=st.sampled_from([None, 0, 2]), seed=st.integers(0, 10**6))
def test_deterministic_modes_form_the_same_batches_whatever_the_durations(lag: int | None, seed: int) -> None:
    cfg = config(
        max_lag=0,
        lag=lag,
        concurrency=3,
        score_batch=(3,),
        batch=5,
        reexecutions=2,
        reexecute_ahead=seed % 2 == 0,
    )
    steps = [b for _, b in Simulator(cfg, seed).run().steps]
    assert steps == [b for _, b in Simulator(cfg, seed + 1).run().steps]
    assert steps == [b for _, b in Simulator(cfg, seed + 2, faults=3).run().steps], (
        "a restarted engine changes nothing"
    )


def test_deterministic_teacher_groups() -> None:
    """At max_lag 0 the teacher's groups are also the same, whatever the order of arrival."""
    groups = []
    for seed in range(4):
        sim = Simulator(config(max_lag=0, concurrency=3, score_batch=(4,), batch=10, steps=2), seed)
        seen: list[tuple[int, ...]] = []
        start = sim.start
        sim.start = lambda a, start=start, seen=seen: (
            seen.append(a.keys) if isinstance(a, Score) else None,
            start(a),
        )[1]  # type: ignore[method-assign]
        sim.run()
        groups.append(sorted(seen))
    assert all(g == groups[0] for g in groups)


def test_a_lag_overlaps_and_max_lag_zero_does_not() -> None:
    times = {"sample": (1.0, 1.0), "score": (2.0, 2.0), "train": (2.0, 2.0), "load": (0.0, 0.0)}
    runs = {
        d: Simulator(config(max_lag=d, steps=10, score_batch=(4,)), durations=times).run() for d in (0, 2)
    }

    def overlap(sim: Simulator) -> float:
        return sum(
            max(0.0, min(b, d) - max(a, c))
            for a, b in sim.busy["train"]
            for c, d in sim.busy["sample"] + sim.busy["score"]
        )

    assert overlap(runs[0]) == 0
    assert overlap(runs[2]) > 5
    assert runs[2].clock < 0.7 * runs[0].clock


def with_straggler(number: int, cfg: ScheduleConfig, **durations: tuple[float, float]) -> Simulator:
    """A run in which sample `number` takes 50 seconds."""
    s = Simulator(cfg, 1, durations=durations)
    original, started, usual = s.after, iter(range(1000)), s.durations["sample"]

    def after(what: str, call: Any) -> None:
        late = what == "sample" and next(started) == number
        s.durations["sample"] = (50.0, 50.0) if late else usual
        original(what, call)

    s.after = after  # type: ignore[method-assign]
    return s.run()


def step_of(s: Simulator, number: int) -> int:
    return next(i for i, (_, batch) in enumerate(s.steps) if str(stream(number)) in batch)


def test_a_straggler_is_overtaken_only_until_its_deadline() -> None:
    cfg = config(max_lag=2, batch=2, steps=8, concurrency=2, inflight="keep")
    s = with_straggler(3, cfg, sample=(1.0, 1.0), score=(0.1, 0.1), train=(0.1, 0.1), publish=(0.0, 0.0))
    assert step_of(s, 4) == 1, "one step overtakes it"
    assert step_of(s, 3) == 2, "the next must wait for it"
    assert s.steps[1][0] < 10
    assert s.steps[2][0] >= 50


@pytest.mark.parametrize("inflight", ["keep", "wait"])
@pytest.mark.parametrize("seed", range(5))
def test_what_starts_at_once_is_not_learnt_from_by_who_ends_first(inflight: str, seed: int) -> None:
    """Three batches start at version 0. The shortest of them must not make up the first."""
    cfg = config(max_lag=2, batch=4, steps=8, concurrency=20, inflight=inflight)
    s = Simulator(cfg, seed, durations={"sample": (0.1, 20.0)}).run()
    assert [sorted(batch) for _, batch in s.steps[:3]] == [
        sorted(str(stream(n)) for n in range(4 * i, 4 * i + 4)) for i in range(3)
    ]


def test_a_step_begins_while_the_version_before_is_published_and_samplers_wait_for_that() -> None:
    s = Schedule(config(max_lag=1, batch=2, steps=3, replicas=2, inflight="keep"), stream, [])
    s.on_learner_ready()
    s.actions()
    for replica in (0, 1):
        s.on_loaded(replica, 0)
    generated = [a for a in s.actions() if isinstance(a, Generate)]
    for action in generated:
        for key in action.keys:
            s.on_sampled(action.replica, key, 0)
            s.on_graded(key)
    train: Train | None = None
    while train is None:
        for action in s.actions():
            if isinstance(action, Score):
                s.on_scored(action.teacher, action.keys)
            train = action if isinstance(action, Train) else train
    s.on_trained(0, dict.fromkeys(train.keys, "trained"))
    assert s.actions() == [Train(1, (2, 3))], "no sampler is told to load a version that is not there"
    s.on_sampler_lost(0)
    s.on_sampler_back(0)
    assert s.actions() == [], "nor the one before, over which step 1 writes"
    s.on_published(1)
    assert s.actions() == [Load(0, 1), Load(1, 1)]
    with pytest.raises(RuntimeError, match="version 3 was published, expected 1"):
        s.on_published(3)


def test_publications_overlap_steps_only_where_a_lag_allows_it() -> None:
    slow = {"publish": (1.0, 3.0), "sample": (0.1, 0.2)}
    assert Simulator(config(max_lag=2, steps=12), 1, slow).run().overlapped > 6
    assert Simulator(config(max_lag=0, steps=12), 1, slow).run().overlapped == 0
    assert Simulator(config(lag=2, steps=12), 1, slow).run().overlapped == 0, "all hold the version before"


def test_the_run_ends_with_its_last_version_published() -> None:
    s = Simulator(config(max_lag=0, batch=1, steps=1)).run().schedule
    assert (s.step, s.published) == (1, 1)


def test_nothing_new_is_admitted_past_the_bound() -> None:
    s = Schedule(config(max_lag=2, batch=4, concurrency=100), stream, [])
    s.on_learner_ready()
    assert s.actions() == [Load(0, 0)]
    s.on_loaded(0, 0)
    (generate,) = s.actions()
    assert isinstance(generate, Generate)
    assert len(generate.keys) == 12  # (max_lag + 0 + 1) batches
    assert s.actions() == []


def test_admission_after_a_restart_counts_what_was_consumed() -> None:
    """A known trap: after recovery the capacity must not inflate."""
    first = Simulator(config(max_lag=1, steps=4), 3).run().schedule
    state = first.state_dict()
    again = Schedule(config(max_lag=1, steps=10, concurrency=100), stream, [])
    again.load_state_dict(state)
    again.on_learner_ready()
    again.actions()
    again.on_loaded(0, 4)
    assert len(again.actions()[0].keys) == 8  # (max_lag + 1) batches, not (max_lag + version + 1)


def test_a_restart_plans_what_was_in_flight_again_without_drawing_it_twice() -> None:
    s = Schedule(config(max_lag=2, batch=2), stream, [])
    s.on_learner_ready()
    s.actions()
    s.on_loaded(0, 0)
    keys = s.actions()[0].keys
    s.on_sampled(0, keys[0], 0)
    s.on_graded(keys[0])
    again = Schedule(config(max_lag=2, batch=2), stream, [])
    again.load_state_dict(s.state_dict())
    assert again.counts["drawn"] == len(keys) == again.in_flight
    again.on_learner_ready()
    actions = again.actions()
    assert [type(a) for a in actions] == [Score, Load]
    again.on_loaded(0, 0)
    assert set(again.actions()[0].keys) == set(keys[1:])
    assert again.counts["drawn"] == len(keys)


def test_a_restart_repeats_reexecutions_that_ran_ahead() -> None:
    """Whatever their outcome, their labels are kept, and no first scoring is repeated."""
    cfg = config(max_lag=2, batch=2, steps=9, reexecutions=2, reexecute_ahead=True, score_batch=(6,))
    s = Schedule(cfg, stream, [])
    s.on_learner_ready()
    s.actions()
    s.on_loaded(0, 0)
    keys = s.actions()[0].keys
    for key in keys:
        s.on_sampled(0, key, 0)
        s.on_graded(key)
    (score,) = s.actions()
    s.on_scored(0, score.keys)
    (train,) = s.actions()
    s.on_trained(0, dict.fromkeys(train.keys, "trained"))
    (train,) = s.actions()
    assert isinstance(train, Train)
    s.on_published(1)
    actions = s.actions()
    assert Load(0, 1) in actions
    found = [a for a in actions if isinstance(a, Reexecute)]
    assert [a.now for a in found] == [1]
    first, second = found[0].keys
    s.on_reexecuted(first, True)
    again = next(a for a in s.actions() if isinstance(a, Score))
    assert again.again
    assert again.keys == (first,)
    s.on_trained(1, dict.fromkeys(train.keys, "trained"))
    resumed = Schedule(cfg, stream, [])
    resumed.load_state_dict(s.state_dict())
    assert [resumed.tickets[k].state for k in (first, second)] == [State.SCORED] * 2
    resumed.on_learner_ready()
    assert next(a for a in resumed.actions() if isinstance(a, Reexecute)) == Reexecute((first, second), 1)


def test_refresh_draws_the_same_prompts_again() -> None:
    s = Schedule(config(max_lag=2, batch=2), stream, [])
    s.on_learner_ready()
    s.actions()
    s.on_loaded(0, 0)
    keys = s.actions()[0].keys
    before = {s.tickets[k].sample for k in keys}
    assert set(s.refresh()) == set(keys)
    assert s.on_sampled(0, keys[0], 0) is False
    redrawn = [s.tickets[k].sample for k in s.actions()[-1].keys]
    assert {(r.prompt, r.attempt) for r in redrawn} == {(b.prompt, 1) for b in before}
    accounts(s)


def test_a_sample_older_than_the_bound_raises() -> None:
    s = Schedule(config(max_lag=0, batch=1), stream, [])
    s.on_learner_ready()
    s.actions()
    s.on_loaded(0, 0)
    (key,) = s.actions()[0].keys
    s.on_sampled(0, key, 0)
    s.on_graded(key)
    s.on_scored(0, s.actions()[0].keys)
    s.step = 1  # as if the admission had been broken
    with pytest.raises(RuntimeError, match="lag 1 > 0"):
        s.actions()


def test_a_full_arena_takes_back_what_is_less_urgent() -> None:
    sim = Simulator(config(max_lag=4, batch=4, steps=12, score_batch=(3,), concurrency=40), 5, arena=8).run()
    assert sim.evictions > 0
    assert sim.schedule.counts["trained"] == 48
