"""A crew within this process, on a virtual clock. The work is real or made up; *when* it ends comes from a
cost model, so a run is deterministic and its lags mix as they do with engines side by side.

    send ──> Engines.do, at once ──> answers, each at its time on the clock ──receive──> conductor

For studies, tests and plans: no engine is lost, none sleeps, and everything runs on the caller's CPU.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, Self, assert_never

from fopd_cli.runtime.build import Setup
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.environment import LocalEnvironments
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.crew.roles import Grading, Learning, Sampling, Teaching
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.tickets import Role

STUCK = "nothing is under way, and nothing can start: the schedule is broken"


class Engines(Protocol):
    """What does the work."""

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        """All answers to a command: one per sample for a `GenerateCommand`, two for a `TrainCommand` or a
        `SaveCommand`, none for commands that ask for nothing, else one.
        """
        ...

    def close(self) -> None: ...


class Costs(Protocol):
    """How long things take, in the units of the clock."""

    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> Sequence[float]:
        """The time of each answer, for an engine that gets the command at `now`."""
        ...

    def stopped(self, now: float, engine: Engine) -> None:
        """A sampler's running work is given up."""


class Virtual:
    """What crews on a virtual clock share. `now` is the time on it."""

    def __init__(self, engines: Engines) -> None:
        self.engines, self.now = engines, 0.0
        self._events: list[tuple[float, int, Engine, m.Event]] = []  # a heap
        self._order = itertools.count()
        self._trained = self._published = -math.inf  # when a learner last was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> None:
        self.engines.close()

    def start(self) -> None:
        """Nothing to do: engines are ready once they are built."""

    def lease(self, sleeper: Role | None, waker: Role) -> None:
        self._happens(self.now, Engine(waker), m.Leased(waker))

    def _happens(self, at: float, engine: Engine, event: m.Event) -> None:
        match event:  # a learner publishes what it has trained, and its next update waits for that
            case m.Trained():
                at = self._trained = max(at, self._published)
            case m.Published():
                at = self._published = max(at, self._trained)
        heapq.heappush(self._events, (at, next(self._order), engine, event))

    def _happened(self) -> Iterator[tuple[Engine, m.Event]]:
        """All events up to now, including those that they cause at the same moment."""
        while self._events and self._events[0][0] <= self.now:
            _, _, engine, event = heapq.heappop(self._events)
            yield engine, event

    def end_programs(self) -> None:
        """Nothing to do: the environment's programs end with it."""

    def memory(self) -> dict[str, int]:
        return {}

    def device_memory(self) -> dict[str, dict[str, int]]:
        return {}


class InProcess(Virtual):
    """See `Crew`. When a command ends is known when it is sent."""

    def __init__(self, engines: Engines, costs: Costs) -> None:
        super().__init__(engines)
        self.costs = costs

    def send(self, engine: Engine, command: m.Command) -> None:
        answers = self.engines.do(engine, command)
        if isinstance(command, m.AbortCommand):
            self._events = [e for e in self._events if e[2] != engine or not isinstance(e[3], m.Sampled)]
            heapq.heapify(self._events)
            self.costs.stopped(self.now, engine)
        ends = self.costs.ends(self.now, engine, command, answers)
        for end, answer in zip(ends, answers, strict=True):
            self._happens(end, engine, answer)

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        """All events of the next moment."""
        if not self._events:
            raise RuntimeError(STUCK)
        self.now = self._events[0][0]
        yield from self._happened()


class LocalEngines:
    """The engines of a run, each built as its worker process would build it, with one rank."""

    def __init__(self, plan: Plan, setup: Setup) -> None:
        self.setup = setup
        self._posted: list[m.Message] = []
        self.learner = Learning(_alone(plan.learners[0]), setup, _breathe, self._posted.append)
        self.teachers = [Teaching(_alone(ranks[0]), setup, _breathe) for ranks in plan.teachers]
        self.samplers = [Sampling(_alone(spec), setup) for spec in plan.samplers]
        self.grader = Grading(setup)
        self._open = contextlib.ExitStack()

    @cached_property
    def environments(self) -> LocalEnvironments:
        """For a task that has environments."""
        task: Any = self.grader.task
        return self._open.enter_context(LocalEnvironments(task, self.setup.frame()))

    def close(self) -> None:
        self._open.close()

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        match command:
            case m.GenerateCommand():
                return self._generate(self.samplers[engine.index], command)
            case m.LoadCommand() | m.AbortCommand():
                return _answers(self.samplers[engine.index].do(command))
            case m.ScoreCommand():
                return _answers(self.teachers[engine.index].do(command))
            case m.TrainCommand():
                return self._train(command)
            case m.EvaluateCommand():
                return _answers(self.learner.do(command))
            case m.SaveCommand():
                return self._save(command)
            case m.GradeCommand():
                return _answers(self.grader.do(command))
            case m.TurnCommand() | m.ReexecuteCommand():
                self.environments.send(command)
                return self.environments.receive(block=True)
            case m.CancelCommand():
                self.environments.send(command)
                return ()
            case _:
                assert_never(command)

    def _train(self, command: m.TrainCommand) -> Sequence[m.Answer]:
        """Until it is published: nothing goes on beside that here."""
        self.learner.do(command)
        self.learner.publisher.finish()
        return self._said()

    def _save(self, command: m.SaveCommand) -> Sequence[m.Answer]:
        """At once: nothing goes on beside it here."""
        answers = _answers(self.learner.do(replace(command, staged=False)))
        return [*answers, *self._said()]

    def _said(self) -> list[m.Answer]:
        """What the learner has said beside its answers since the last call."""
        said, self._posted[:] = list(self._posted), []
        for message in said:
            if isinstance(message, m.Failed):
                raise RuntimeError(message.message)
        return [answer for message in said for answer in _answers(message)]

    def _generate(self, sampler: Sampling, command: m.GenerateCommand) -> list[m.Answer]:
        """One answer per sample, in key order."""
        sampler.do(command)
        found = []
        while sampler.busy:
            if (sampled := sampler.step()) is not None:
                found += sampled.rollouts
        return [m.Sampled([rollout], [], 0) for rollout in sorted(found, key=lambda r: r.key)]


def _alone(spec: WorkerSpec) -> WorkerSpec:
    """The same engine as one rank."""
    return replace(spec, rank=0, world=1)


def _breathe() -> None:
    """Nothing here watches for a pulse."""


def _answers(message: m.Message | None) -> Sequence[m.Answer]:
    if message is None:
        return ()
    assert isinstance(message, m.Answer)
    return (message,)
