"""The crew of a run: worker processes on this machine (`fleet.py`); several may be ranks of one engine
(`ranks.py`). On a time-sliced box one role works at a time; where memory allows, it wakes while the one
before falls asleep.

A sampler, a teacher, the grader or the environment that dies, hangs or raises is restarted; `restarts.py`
says how often. One that is lost while asleep is restarted when its role wakes. Messages that a lost worker
sent, and rollouts that a sampler finished before it saw an abort, are not passed on: that work is done again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, assert_never

from fopd_cli.errors import Interrupted, WorkerError
from fopd_cli.names import beside
from fopd_cli.runtime.build import Setup
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew import roles
from fopd_cli.runtime.crew.crew import ENVIRONMENT, GRADER, LEARNER, Engine
from fopd_cli.runtime.crew.fleet import STARTERS, Fleet, Worker, WorkerSpec
from fopd_cli.runtime.crew.ranks import Calls
from fopd_cli.runtime.crew.restarts import REPLACEABLE, Restarts
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.tickets import Role
from fopd_cli.runtime.signals import Signals

MAINS = {
    "learner": roles.learner_main,
    "teacher": roles.teacher_main,
    "sampler": roles.sampler_main,
    "grader": roles.grader_main,
    "environment": roles.environment_main,
}
ALWAYS_AWAKE = ("grader", "environment")
WAIT_S = 0.5


class Processes:
    """See `Crew`. `logs` is the folder for the workers' output; `say` tells people what was lost. After a
    signal no worker is restarted.
    """

    def __init__(
        self,
        plan: Plan,
        setup: Setup,
        logs: Path,
        reexecutable: bool,
        signals: Signals,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.setup, self._logs, self._signals = plan, setup, logs, signals
        self._say = say
        self._engines = _engines(plan, reexecutable)
        self._calls = {engine: Calls(len(ranks)) for engine, ranks in self._engines.items()}
        # under way beside the learner's other commands
        self._saves, self._publications = Calls(len(plan.learners)), Calls(len(plan.learners))
        self._restarts = Restarts(plan, setup.recipe.runtime.restarts)
        self._running: dict[Engine, set[int]] = {e: set() for e in self._engines if e.role == "sampler"}
        self._loading: set[Engine] = set()
        self._turn: Role | None = None  # the role that is awake; None: none, or all where none sleeps
        self._changing_turns = False
        self._lost_asleep: list[WorkerSpec] = []
        self._heard: deque[tuple[Engine, m.Event]] = deque()  # received while it waited for something else

    def __enter__(self) -> Processes:
        limits = self.setup.recipe.runtime
        self.fleet = Fleet(self._logs, limits.timeout_s, limits.start_timeout_s)
        self.fleet.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> None:
        self.fleet.__exit__(kind, error, traceback)
        for path in self.setup.rendezvous.parent.glob(".rendezvous-*"):
            path.unlink()

    def memory(self) -> dict[str, int]:
        return self.fleet.memory()

    def device_memory(self) -> dict[str, dict[str, int]]:
        return self.fleet.device_memory()

    def end_programs(self) -> None:
        self.fleet.stop(STARTERS)

    # ---- start ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The learner first: it publishes the weights that all others start from. Roles that share devices
        start one at a time.
        """
        self._say(f"starting {self.plan.describe()}")
        waiting: set[str] = set()
        for role in MAINS:
            specs = self._of_role(role)
            for spec in specs:
                self._spawn(spec)
                waiting.add(spec.name)
            if self.plan.shared and role not in ALWAYS_AWAKE:
                self._await(waiting, m.Ready)
            if self.plan.exclusive and role not in ALWAYS_AWAKE:
                self._tell(specs, m.SleepCommand())
                self._await({spec.name for spec in specs}, m.Asleep)
        self._await(waiting, m.Ready)

    def _of_role(self, role: str) -> list[WorkerSpec]:
        return [s for engine, ranks in self._engines.items() if engine.role == role for s in ranks]

    def _spawn(self, spec: WorkerSpec) -> None:
        self.fleet.start(spec, MAINS[spec.role], self.setup, replaceable=spec.role in REPLACEABLE)

    def _await(self, names: set[str], kind: type | tuple[type, ...]) -> None:
        """Wait for one message of this kind, or these, from each of these workers, and empty `names`; other
        messages are kept for later.

        A worker that dies in its first start ends the run. During a change of turns it is lost as at any
        other time. After Ctrl-C, workers that are starting are not waited for.
        """
        while names:
            if self._signals.received and not self._changing_turns:
                raise Interrupted(
                    "stopped before the first step; nothing was trained since the last checkpoint"
                )
            if self._signals.received and kind is m.Ready:
                return
            for worker, message in self.fleet.receive(WAIT_S):
                if isinstance(message, kind) and worker.name in names:
                    names.discard(worker.name)
                elif isinstance(message, m.Lost) and worker.name in names and not self._changing_turns:
                    raise WorkerError(message.reason)
                else:
                    self._heard += self._events(worker, message)
            names.intersection_update(self.fleet.workers)

    # ---- commands ------------------------------------------------------------------------------------------

    def send(self, engine: Engine, command: m.Command) -> None:
        match command:
            case m.GenerateCommand(requests):
                self._running[engine].update(r.key for r in requests)
                self._tell_sampler(engine, command)
            case m.LoadCommand():
                self._loading.add(engine)
                self._tell_sampler(engine, command)
            case m.AbortCommand():
                self._running[engine].clear()
                if (worker := self._worker(engine)) is not None:
                    worker.aborts += 1
                self._tell_sampler(engine, command)
            case m.ScoreCommand() | m.EvaluateCommand():
                self._calls[engine].asked()
                self._tell(self._engines[engine], command)
            case m.TrainCommand():
                self._calls[engine].asked()
                self._publications.asked()
                self._tell(self._engines[engine], command, answers=2)
            case m.SaveCommand():
                self._calls[engine].asked()
                self._saves.asked()
                self._tell(self._engines[engine], command, answers=2)
            case m.GradeCommand() | m.TurnCommand():
                self._tell(self._engines[engine], command)
            case (
                m.ReexecuteCommand() | m.CancelCommand()
            ):  # a re-execution may take its time; a cancel has no answer
                self._tell(self._engines[engine], command, answers=0)
            case _:
                assert_never(command)

    def _tell(self, specs: Sequence[WorkerSpec], command: Any, answers: int = 1) -> None:
        for spec in specs:
            self.fleet.send(spec.name, command, answers)

    def _tell_sampler(self, engine: Engine, command: m.SamplerCommand) -> None:
        self._tell(self._engines[engine], command, answers=0)
        self._sampler_owes(engine)

    def _sampler_owes(self, engine: Engine) -> None:
        """A sampler answers many requests with few messages: it owes something as long as anything runs."""
        if (worker := self._worker(engine)) is not None:
            worker.owe(len(self._running[engine]) + (engine in self._loading))

    def _worker(self, engine: Engine) -> Worker | None:
        """The worker of a single-process engine; None if it is lost."""
        return self.fleet.workers.get(self._engines[engine][0].name)

    def lease(self, sleeper: Role | None, waker: Role) -> None:
        """Workers that were lost asleep, or are lost now, are restarted when their role wakes, once the other
        role is asleep: where turns overlap there is room for a role that wakes, not for one that starts.
        """
        self._changing_turns = True
        resting: set[str] = set()
        if sleeper is not None:
            resting |= self._rest(sleeper, m.SleepCommand())
            if (sleeper, waker) not in self.plan.overlaps:
                self._await(resting, m.Asleep)
        resting |= self._rest(waker, m.WakeCommand())
        self._await(resting, (m.Asleep, m.Awake))
        while back := [s for s in self._lost_asleep if s.role == waker]:
            self._lost_asleep = [s for s in self._lost_asleep if s.role != waker]
            for spec in back:
                self._spawn(spec)
            self._await({spec.name for spec in back}, m.Ready)
        self._changing_turns, self._turn = False, waker
        self._heard.append((Engine(waker), m.Leased(waker)))

    def _rest(self, role: Role, command: m.RestCommand) -> set[str]:
        """Tell all workers of a role, without those that are lost; returns who will answer."""
        specs = [s for s in self._of_role(role) if s.name in self.fleet.workers]
        self._tell(specs, command)
        return {spec.name for spec in specs}

    # ---- events --------------------------------------------------------------------------------------------

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        """One event at a time, each after the one before was handled: if that stopped a sampler, the
        sampler's later messages are dropped.
        """
        if self._heard:
            while self._heard:
                yield self._heard.popleft()
            return
        for worker, message in self.fleet.receive(WAIT_S):
            yield from self._events(worker, message)

    def _events(self, worker: Worker, message: m.Message) -> Iterator[tuple[Engine, m.Event]]:
        """The events that the conductor gets for a worker's message."""
        engine = Engine.of(worker.spec)
        if isinstance(message, m.Lost):
            yield from self._lost(worker.spec, message)
            return
        if self.fleet.workers.get(worker.name) is not worker:
            return  # sent before it was lost
        for span in _spans(message):
            yield engine, m.Worked(track(worker.name, message), span)
        match message:
            case m.Sampled(rollouts):
                if message.aborts == worker.aborts:  # else sent before it saw the abort
                    self._running[engine].difference_update(r.key for r in rollouts)
                    self._sampler_owes(engine)
                    yield engine, message
            case m.Loaded():
                self._loading.discard(engine)
                self._sampler_owes(engine)
                yield engine, message
            case m.Scored() | m.Trained() | m.Evaluated() | m.Staged():
                if (answer := self._calls[engine].answered(worker.spec.rank, message)) is not None:
                    yield engine, answer
            case m.Saved():
                if (answer := self._saves.answered(worker.spec.rank, message)) is not None:
                    yield engine, answer
            case m.Published():
                if (answer := self._publications.answered(worker.spec.rank, message)) is not None:
                    yield engine, answer
            case m.Graded() | m.Observed() | m.Reexecuted():
                yield engine, message
            case m.Ready():  # it was restarted
                if self._restarts.ready(worker.spec) and worker.spec.role not in ALWAYS_AWAKE:
                    yield engine, m.EngineBack()
            case m.Asleep() | m.Awake() | m.Failed():
                raise RuntimeError(f"{worker.name} sent an unexpected {type(message).__name__}")
            case _:
                assert_never(message)

    def _lost(self, spec: WorkerSpec, lost: m.Lost) -> Iterator[tuple[Engine, m.Event]]:
        """An engine is restarted at most `runtime.restarts` times, and never where the user must fix
        something.
        """
        if self._restarts.known(spec):
            return
        engine = Engine.of(spec)
        for rank in self._restarts.ranks(spec):
            if rank.name in self.fleet.workers:
                self.fleet.remove(rank.name)
        self._calls[engine].clear()
        self._loading.discard(engine)
        if engine in self._running:
            self._running[engine].clear()
        if self._signals.received:
            self._say(f"{lost.reason}; the run is ending")
            yield engine, m.EngineLost(lost.reason)
        elif lost.mistake:
            yield engine, m.EngineLost(lost.reason, fatal=True, mistake=True)
        else:
            yield from self._start_again(engine, spec, lost.reason)

    def _start_again(self, engine: Engine, spec: WorkerSpec, reason: str) -> Iterator[tuple[Engine, m.Event]]:
        again, limit = self._restarts.again(spec), self._restarts.limit
        if not again:
            self._say(f"{reason}; not restarting it: it has used up its {limit} restarts (runtime.restarts)")
            fatal = self._restarts.nobody_left(spec.role)
            reason = f"{reason}; there is no other {spec.role}" if fatal else reason
            yield engine, m.EngineLost(reason, fatal=fatal)
            return
        self._say(f"{reason}; restarting it ({self._restarts.count(spec)} of {limit})")
        yield engine, m.EngineLost(reason, restarted=True)
        if self._asleep(spec.role):
            self._lost_asleep += again
            for rank in again:
                if self._restarts.ready(rank):
                    yield engine, m.EngineBack()
            return
        for rank in again:
            self._spawn(rank)
        if spec.role in ALWAYS_AWAKE:  # commands from now on wait in its inbox
            yield engine, m.EngineBack()

    def _asleep(self, role: str) -> bool:
        awake = None if self._changing_turns else self._turn
        return self.plan.exclusive and role not in (awake, *ALWAYS_AWAKE)


def _engines(plan: Plan, reexecutable: bool) -> dict[Engine, tuple[WorkerSpec, ...]]:
    """The ranks of every engine."""
    engines = {LEARNER: plan.learners}
    engines |= {Engine("teacher", i): ranks for i, ranks in enumerate(plan.teachers)}
    engines |= {Engine("sampler", s.rank): (s,) for s in plan.samplers}
    engines[GRADER] = (plan.grader,)
    if reexecutable:
        engines[ENVIRONMENT] = (WorkerSpec("environment", 0, 1, (), 1),)
    return engines


def track(worker: str, message: m.Message) -> str:
    """Whose line in the timeline the message's spans are on: what a learner does beside its steps has lines
    of its own.
    """
    match message:
        case m.Saved():
            return beside(worker, "writer")
        case m.Published():
            return beside(worker, "publisher")
        case _:
            return worker


def _spans(message: m.Message) -> list[m.Span]:
    match message:
        case m.Sampled():
            return message.spans
        case m.Trained() | m.Published():
            return [message.span]
        case m.Loaded() | m.Scored() | m.Graded() | m.Observed() | m.Reexecuted() | m.Evaluated():
            return [message.span]
        case m.Staged() | m.Saved():
            return [message.span]
        case m.Ready() | m.Asleep() | m.Awake() | m.Failed() | m.Lost():
            return []
        case _:
            assert_never(message)
