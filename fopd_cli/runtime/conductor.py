"""Drives `schedule.py` with real workers: carries out its actions, tells it what came back, writes down what
happened.

    prompt ──> sampler ──Rollout──> teacher ──targets in the arena──> learner ──StepReport──> conductor
                  ^          └────────> grader ──grade──────────────────┘  │
                  └────────────── weights, version t, shared memory ───────┘

One thread, no CUDA context, no clock in its decisions. Its loop: start what the schedule allows, wait for
messages, handle each. What a handler consumes and unblocks is said at the handler.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from pathlib import Path
from typing import Any

from fopd_cli.engines.models import hf
from fopd_cli.errors import Interrupted, UserError, WorkerError
from fopd_cli.inputs import Inputs
from fopd_cli.runtime.buffer import Buffer, Entry
from fopd_cli.runtime.build import Setup, sampler_dtype
from fopd_cli.runtime.control import Control
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew import roles
from fopd_cli.runtime.crew.fleet import STARTERS, Fleet, Worker, WorkerSpec
from fopd_cli.runtime.crew.restarts import REPLACEABLE, Restarts
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.journal import Changes, Journal
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.saving import Saver
from fopd_cli.runtime.memory.sizes import arena_bytes
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.scheduling.episodes import Episodes
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.scheduling.prompts import context_tokens, evaluation_ids, schedule_config
from fopd_cli.runtime.scheduling.replays import Replays
from fopd_cli.runtime.scheduling.schedule import Schedule
from fopd_cli.runtime.scheduling.tickets import (
    Abort,
    Generate,
    Lease,
    Load,
    Measure,
    Replay,
    Role,
    Score,
    Train,
)
from fopd_cli.runtime.signals import Signals
from fopd_cli.samples import Request, Rollout, SampleStats, StepReport

MAINS = {
    "learner": roles.learner_main,
    "teacher": roles.teacher_main,
    "sampler": roles.sampler_main,
    "grader": roles.grader_main,
    "environment": roles.environment_main,
}
ENVIRONMENT = WorkerSpec("environment", 0, 1, (), 1)


class Conductor:
    """One run, from spawn to summary."""

    def __init__(self, inputs: Inputs, run_dir: RunDir) -> None:
        recipe, plan, stream = inputs.recipe, inputs.plan, inputs.stream
        self.recipe, self.run_dir, self.plan, self.stream = recipe, run_dir, plan, stream
        self.tokenizer = inputs.tokenizer
        self.buffer = Buffer(inputs.target_specs, arena_bytes(recipe, inputs.target_specs))
        self.control = Control(recipe)
        self.schedule = Schedule(
            schedule_config(recipe, len(plan.samplers), plan.exclusive, stream.replayable),
            stream.train_id,
            evaluation_ids(recipe, stream),
            self.buffer.reserve,
            self.buffer.release,
            stream.teacher,
        )
        self.schedule.ahead = self.control.ahead
        self.setup = Setup(
            recipe,
            inputs.vocab,
            inputs.target_specs,
            inputs.tables,
            context_tokens(recipe, stream, judged=False),
            context_tokens(recipe, stream, judged=True),
            self.buffer.arena.memory,
            WeightChannel.create(inputs.published),
            run_dir.path / f".rendezvous-{uuid.uuid4().hex[:8]}",
        )
        self.journal = Journal(recipe, run_dir, inputs.tokenizer)
        self.saver = Saver(
            recipe,
            run_dir,
            self.schedule,
            self.buffer,
            self.control,
            self.journal,
            self.setup.channel,
            sampler_dtype(recipe, plan),
        )
        self.signals = Signals(self.journal.say)
        self.replays = Replays()
        self.episodes = Episodes() if stream.episodic else None
        self._held: dict[int, Request] = {}  # next turns that wait for the others of their group
        self._params = {
            "train": sampling_params(recipe, evaluation=False),
            "eval": sampling_params(recipe, evaluation=True),
        }
        self._score_answers: deque[list[Any]] = deque()  # [teacher, keys, answers still due], oldest first
        self.restarts = Restarts(plan, recipe.runtime.restarts)
        self._asleep_lost: list[WorkerSpec] = []  # died in their sleep; started again when their role wakes
        self._changing_turns = False
        self._failure: str | None = None  # why the run has to end
        self._mistake = False  # because of what the user has to mend
        self._answers_due = 0  # of the learner's or a lease's current command
        self._first_answer: Any = None
        self._saved: list[m.Saved] = []
        self.stopped_early: str | None = None

    # ---- life ----------------------------------------------------------------------------------------------

    def restore(self, step: int, state: dict[str, Any], changes: Changes, anew: bool = False) -> None:
        """Take up a checkpoint's state, see `Saver.restore`."""
        self.setup.restore = self.saver.restore(step, state, changes, anew)

    def run(self) -> None:
        """Train to the end. Raises `Interrupted` after a signal, with a checkpoint written."""
        limits = self.recipe.runtime
        try:
            with Fleet(self.run_dir.logs, limits.timeout_s, limits.start_timeout_s) as self.fleet:
                self._start_workers()
                self.saver.begin()
                self.journal.begin()
                self._grade(self.buffer.ungraded())  # of a checkpoint's buffer
                self.schedule.on_learner_ready()
                while not self.schedule.done and self.stopped_early is None:
                    self._advance()
                    if self.signals.received or self._failure:
                        self._leave()
                if self.stopped_early is not None:
                    self._come_to_rest()
                self.saver.save(True, self._save_learner)
        finally:
            for path in self.run_dir.path.glob(".rendezvous-*"):
                path.unlink()

    def _advance(self, act: bool = True) -> None:
        """One turn of the loop."""
        while act and (actions := self.schedule.actions()):
            for action in actions:
                self._start(action)
        for worker, message in self.fleet.receive(timeout=0.5):
            self._handle(worker, message)

    def _come_to_rest(self) -> None:
        """Let the running step end; what is in flight goes into the checkpoint."""
        self.schedule.paused = True
        if self.plan.exclusive:
            self.schedule.abandon()
            self._abort_all()
        while self.schedule.learner_busy or (self.plan.exclusive and self.schedule.lease != "learner"):
            self._advance()

    def _leave(self) -> None:
        """After Ctrl-C, or without samplers or a teacher: save and go."""
        self._come_to_rest()
        self.saver.save(True, self._save_learner)
        self.fleet.stop(STARTERS)  # who started programs ends them
        if self._failure:
            if self._mistake:
                raise UserError(f"{self._failure}; mend that, then: fopd resume {self.run_dir.path}")
            raise WorkerError(f"{self._failure}; go on with: fopd resume {self.run_dir.path}")
        raise Interrupted(
            f"stopped after {self.schedule.step} of {self.recipe.learner.steps} steps; "
            f"go on with: fopd resume {self.run_dir.path}"
        )

    def _start_workers(self) -> None:
        """The learner first: it publishes the weights that all others start from. Sharing devices, one at a
        time.
        """
        self.journal.say(f"starting {self.plan.describe()}")
        waiting: set[str] = set()
        for role in ("learner", "teacher", "sampler", "grader", "environment"):
            specs = self._specs(role)
            for spec in specs:
                self._spawn(spec)
                waiting.add(spec.name)
            if self.plan.exclusive and role not in ("grader", "environment"):
                self._await(waiting, m.Ready)
                for spec in specs:
                    self.fleet.send(spec.name, m.SleepCommand())
                self._await({spec.name for spec in specs}, m.Asleep)
        self._await(waiting, m.Ready)

    def _specs(self, role: str) -> list[WorkerSpec]:
        everyone = (*self.plan.everyone, *([ENVIRONMENT] if self.stream.replayable else []))
        return [s for s in everyone if s.role == role]

    def _spawn(self, spec: WorkerSpec) -> None:
        self.fleet.start(spec, MAINS[spec.role], self.setup, replaceable=spec.role in REPLACEABLE)

    def _await(self, names: set[str], kind: type) -> None:
        """Wait for one message of this kind from each of these workers; others are handled as ever.

        A worker that dies in its first start ends the run. In a change of turns it is lost as at any other
        time, and after Ctrl-C nobody waits for one that is starting.
        """
        while names:
            if self.signals.received and not self._changing_turns:
                raise Interrupted(
                    "stopped before the first step; nothing was trained since the last checkpoint"
                )
            if self.signals.received and kind is m.Ready:
                return
            for worker, message in self.fleet.receive(timeout=0.5):
                if isinstance(message, kind) and worker.name in names:
                    names.discard(worker.name)
                elif isinstance(message, m.Lost) and worker.name in names and not self._changing_turns:
                    raise WorkerError(message.reason)
                else:
                    self._handle(worker, message)
            names.intersection_update(self.fleet.workers)

    # ---- actions -------------------------------------------------------------------------------------------

    def _start(self, action: Any) -> None:
        match action:
            case Generate(replica, keys):
                requests = [self._request(k) for k in keys]
                if self.episodes is not None:
                    for request in requests:
                        self.episodes.start(request, replica)
                self._to_sampler(replica, m.GenerateCommand(requests))
            case Load(replica, version):
                self._to_sampler(replica, m.LoadCommand(version))
            case Abort(replica):
                self.fleet.workers[f"sampler-{replica}"].aborts += 1
                self._to_sampler(replica, m.AbortCommand())
                self._give_up(replica)
            case Score(teacher, keys, again):
                entries = [self.buffer[k] for k in keys]
                command = m.ScoreCommand(
                    [self._judged(e) for e in entries], [e.targets for e in entries], again
                )
                for entry in entries:
                    entry.scoring = True
                self._score_answers.append([teacher, keys, len(self.plan.teachers[teacher])])
                self._to_all(self.plan.teachers[teacher], command)
            case Replay(keys, now):
                self.replays.begin(keys, holding=not self.schedule.learner_busy)
                for key in keys:
                    self._replay(key, now)
            case Train(step, keys):
                self.journal.step_begins()
                self._learn(step, keys)
            case Measure(_, keys):
                self._learn(None, keys)
            case Lease(sleeper, waker):
                self._pass_lease(sleeper, waker)

    def _request(self, key: int) -> Request:
        sample = self.schedule.tickets[key].sample
        return Request(
            key, self.stream.token_ids(sample), sample.seed(self.recipe.seed), self._params[sample.split]
        )

    def _judged(self, entry: Entry) -> Rollout:
        return entry.judged(self.stream.told(self.schedule.tickets[entry.key].sample))

    def _replay(self, key: int, now: int) -> None:
        ticket = self.schedule.tickets[key]
        sample, template = ticket.sample, self.recipe.teachers[ticket.teacher].context
        command = m.ReplayCommand(
            self.buffer[key].rollout, self.stream.prompt(sample), self.stream.told(sample), template, now
        )
        self.fleet.send(ENVIRONMENT.name, command, answers=0)

    def _learn(self, step: int | None, keys: tuple[int, ...]) -> None:
        lags = [self.schedule.step - self.schedule.tickets[k].version for k in keys]
        entries = [self.buffer[k] for k in keys]
        command = m.TrainCommand(step, [e.rollout for e in entries], [e.targets for e in entries], lags)
        self._answers_due = len(self.plan.learners)
        self._to_all(self.plan.learners, command)

    def _to_sampler(self, replica: int, command: Any) -> None:
        self.fleet.send(f"sampler-{replica}", command, answers=0)
        self._sampler_owes(replica)

    def _sampler_owes(self, replica: int) -> None:
        """A sampler answers many requests with few messages: what it owes is what the schedule says is
        running.
        """
        state = self.schedule.replicas[replica]
        if (worker := self.fleet.workers.get(f"sampler-{replica}")) is not None:
            waiting = 0 if self.episodes is None else self.episodes.waiting(replica)
            worker.owe(len(state.running) - waiting + (state.loading is not None))

    def _to_all(self, specs: Any, command: Any) -> None:
        for spec in specs:
            self.fleet.send(spec.name, command)

    def _pass_lease(self, sleeper: Role | None, waker: Role) -> None:
        """Put one role to sleep, then wake the other; who was lost in its sleep, or is lost now, is started
        anew.
        """
        self._changing_turns = True
        for role, command, kind in ((sleeper, m.SleepCommand(), m.Asleep), (waker, m.WakeCommand(), m.Awake)):
            if role is not None:
                specs = [s for s in self._specs(role) if s.name in self.fleet.workers]
                self._to_all(specs, command)
                self._await({spec.name for spec in specs}, kind)
        while back := [s for s in self._asleep_lost if s.role == waker]:
            self._asleep_lost = [s for s in self._asleep_lost if s.role != waker]
            for spec in back:
                self._spawn(spec)
            self._await({spec.name for spec in back}, m.Ready)
        self._changing_turns = False
        self.schedule.on_leased(waker)

    def _forget(self, key: int) -> None:
        """A sample is done with, whatever became of it."""
        self.buffer.forget(key)
        self.replays.forget(key)

    # ---- messages ------------------------------------------------------------------------------------------

    def _handle(self, worker: Worker, message: Any) -> None:
        if not isinstance(message, m.Lost) and self.fleet.workers.get(worker.name) is not worker:
            return  # said before it was lost; what it had under way is done again
        for span in getattr(message, "spans", None) or ([message.span] if hasattr(message, "span") else []):
            self.journal.worked(worker.name, span)
        match message:
            case m.Sampled() if message.aborts < worker.aborts:
                pass  # said before it knew that these are aborted; they may be under way anew
            case m.Sampled():
                finished = message.rollouts if self.episodes is None else self._on_turns(message.rollouts)
                self._on_sampled(worker.spec.rank, finished)
                self._next_turns(worker.spec.rank)
            case m.Observed() | m.Replayed() | m.Graded() if self.signals.received:
                pass  # the programs behind it may have got the same signal; it is done again
            case m.Observed():
                self._on_observed(message)
            case m.Loaded():
                self.journal.loaded(message.span)
                self.schedule.on_loaded(worker.spec.rank, message.version)
                self._sampler_owes(worker.spec.rank)
            case m.Replayed():
                self._on_replayed(message)
            case m.Graded():
                for key, grade, metrics in message.grades:
                    if key in self.buffer:
                        self.buffer[key].grade, self.buffer[key].metrics = grade, metrics
                        self.schedule.on_graded(key)
            case m.Scored():
                self._on_scored(worker.spec.index, message.keys)
            case m.Lost():
                self._on_lost(worker.spec, message)
            case m.Ready():
                self._on_back(worker.spec)
            case m.Trained() | m.Measured():
                self._on_learned(worker, message)
            case m.Saved():
                self._saved.append(message)
            case _:
                raise RuntimeError(f"{worker.name} sent an unexpected {type(message).__name__}")

    def _on_sampled(self, replica: int, rollouts: list[Rollout]) -> None:
        """Finished generations: to the grader now, to the teacher when the schedule says so."""
        kept = []
        for rollout in rollouts:
            if self.schedule.on_sampled(replica, rollout.key, rollout.oldest_version):
                self.journal.sampled(rollout)
                kept.append(self.buffer.add(rollout, self.schedule.tickets[rollout.key].teacher))
        self._grade(kept)

    def _on_turns(self, turns: list[Rollout]) -> list[Rollout]:
        """Turns go to their environment, which unblocks `_on_observed`; returns episodes that ended, out of
        tokens.
        """
        assert self.episodes is not None
        finished = []
        for turn in turns:
            if (episode := self.episodes.on_turn(turn)) is None:
                continue
            if turn.finish == "length":
                self.fleet.send(ENVIRONMENT.name, m.CancelCommand([turn.key]), answers=0)
                finished.append(self.episodes.finish(episode))
                continue
            prompt = self.stream.prompt(self.schedule.tickets[turn.key].sample)
            text = hf.decode_turn(self.tokenizer, turn.response_ids)
            now = self.schedule.tickets[turn.key].version
            command = m.TurnCommand(turn.key, episode.life, prompt, text, now, int(turn.response_ids[-1]))
            self.fleet.send(ENVIRONMENT.name, command)
        return finished

    def _on_observed(self, message: m.Observed) -> None:
        """The environment answered: the episode's next turn, or its end."""
        assert self.episodes is not None
        episode = self.episodes.on_observed(
            message.key, message.life, message.token_ids, message.calls, message.answer
        )
        if episode is None:
            return
        request = None if message.token_ids is None else self.episodes.next_turn(episode)
        if request is not None:
            self._held[message.key] = request
        else:
            if message.token_ids is not None:  # no token is left to answer with
                self.fleet.send(ENVIRONMENT.name, m.CancelCommand([message.key]), answers=0)
            self._on_sampled(episode.replica, [self.episodes.finish(episode)])
        self._next_turns(episode.replica)

    def _next_turns(self, replica: int) -> None:
        """Give a sampler the turns that can go on; at depth 0 all together, so that two runs form the same
        batches.
        """
        if self.episodes is not None:
            own = sorted(k for k in self._held if self.episodes.running[k].replica == replica)
            rest = [
                k for k, e in self.episodes.running.items() if e.replica == replica and k not in self._held
            ]
            if own and not (rest and self.schedule.config.deterministic):
                for key in own:
                    self.episodes.running[key].sampling = True
                self._to_sampler(replica, m.GenerateCommand([self._held.pop(k) for k in own]))
        self._sampler_owes(replica)

    def _give_up(self, replica: int) -> None:
        """A sampler was stopped: its episodes are done again from their start, or were dropped."""
        if self.episodes is None:
            return
        lost = self.episodes.drop([k for k, e in self.episodes.running.items() if e.replica == replica])
        for key in lost:
            self._held.pop(key, None)
        self.fleet.send(ENVIRONMENT.name, m.CancelCommand(lost), answers=0)

    def _grade(self, entries: list[Entry]) -> None:
        for entry in [] if self.recipe.eval.training else entries:
            if self.schedule.tickets[entry.key].sample.split == "train":
                entry.grade = math.nan
                self.schedule.on_graded(entry.key)
        entries = [entry for entry in entries if entry.grade is None]
        # else the run is ending, or it is told when it is back
        if entries and "grader-0" in self.fleet.workers:
            prompts = [self.stream.prompt(self.schedule.tickets[e.key].sample) for e in entries]
            items = [(e.key, p, self._text(e.rollout)) for e, p in zip(entries, prompts, strict=True)]
            self.fleet.send("grader-0", m.GradeCommand(items))

    def _on_replayed(self, message: m.Replayed) -> None:
        """A context was looked at; the teacher is asked again if it has changed."""
        if message.key in self.buffer:
            changed = message.context is not None
            self.buffer[message.key].context = message.context
            self.replays.end(message.key, changed, message.span.end - message.span.start)
            self.schedule.on_replayed(message.key, changed)

    def _on_scored(self, teacher: int, keys: list[int]) -> None:
        """A teacher call is complete when all its ranks have answered."""
        entry = next(e for e in self._score_answers if e[0] == teacher and list(e[1]) == keys)
        entry[2] -= 1
        if entry[2] == 0:
            self._score_answers.remove(entry)
            for key in keys:
                self.buffer[key].scoring = False
            for key in self.schedule.on_scored(teacher, keys):
                self._forget(key)

    def _on_lost(self, spec: WorkerSpec, lost: m.Lost) -> None:
        """Someone other than the learner is gone: what it had under way is done again, and it is started
        anew.

        After `runtime.restarts` of them it stays away; if the run cannot go on without it, it ends with a
        checkpoint. So it does at once where the user has something to mend.
        """
        reason = lost.reason
        if self.restarts.known(spec):
            return
        for rank in self.restarts.ranks(spec):
            if rank.name in self.fleet.workers:
                self.fleet.remove(rank.name)
        if spec.role == "teacher":
            for key in self.schedule.on_teacher_lost(spec.index):
                self.buffer.release(key)
            self._drop_calls(spec.index)
        elif spec.role == "sampler":
            self.schedule.on_sampler_lost(spec.rank)
            self._give_up(spec.rank)
        elif spec.role == "environment":  # and with it the state of all episodes
            self.schedule.on_environment_lost()
            self.schedule.abandon()
            self._abort_all()
        if self.signals.received:
            self.journal.say(f"{reason}; the run is ending")
            return
        if lost.mistake:
            self._failure, self._mistake = reason, True
            return
        again = self.restarts.again(spec)
        if not again:
            self.journal.say(
                f"{reason}; started again {self.restarts.limit} times (runtime.restarts), it stays away"
            )
            if self.restarts.nobody_left(spec.role):
                self._failure = f"{reason}; there is no other {spec.role}"
            return
        self.journal.totals.restarts += 1
        self.journal.say(
            f"{reason}; starting it again ({self.restarts.count(spec)} of {self.restarts.limit})"
        )
        awake = None if self._changing_turns else self.schedule.lease
        if self.plan.exclusive and spec.role not in (awake, "grader", "environment"):
            self._asleep_lost += again
            for rank in again:
                self._on_back(rank)
            return
        for rank in again:
            self._spawn(rank)
        if spec.role == "grader":
            self._grade(self.buffer.ungraded())

    def _drop_calls(self, teacher: int) -> None:
        """Forget what a lost teacher was asked; samples that a refresh had dropped meanwhile are let go for
        good.
        """
        for entry in [e for e in self._score_answers if e[0] == teacher]:
            self._score_answers.remove(entry)
            for key in entry[1]:
                self.buffer[key].scoring = False
                if key not in self.schedule.tickets:
                    self._forget(key)

    def _on_back(self, spec: WorkerSpec) -> None:
        """A process that was started again stands, or will when its turn comes."""
        if not self.restarts.ready(spec):
            return
        if spec.role == "teacher":
            self.schedule.on_teacher_back(spec.index)
        elif spec.role == "sampler":
            self.schedule.on_sampler_back(spec.rank)

    def _on_learned(self, worker: Worker, message: m.Trained | m.Measured) -> None:
        """A learner command is complete when all ranks have answered; rank 0's answer is the one that
        counts.
        """
        if worker.spec.rank == 0:
            self._first_answer = message
        self._answers_due -= 1
        if self._answers_due:
            return
        if isinstance(self._first_answer, m.Measured):
            self._on_measured(self._first_answer.stats)
        else:
            self._on_trained(self._first_answer.report)
        self.replays.hold()

    def _on_measured(self, stats: SampleStats) -> None:
        """Held-out samples are measured; with the last of them the evaluation is written down."""
        version, keys = self.schedule.step, stats.keys.tolist()
        self.journal.measured(stats, [(self.schedule.tickets[k].sample, self.buffer[k]) for k in keys])
        for key in keys:
            self._forget(key)
        if self.schedule.on_measured(version, keys):
            self.journal.evaluated(version)
            self.stopped_early = self.saver.keep_best(version)

    def _on_trained(self, report: StepReport) -> None:
        """An optimizer step and its publication are done: write it down, let its samples go, refresh if
        stale.
        """
        keys = report.stats.keys.tolist()
        batch = [(self.schedule.tickets[k].sample, self.buffer[k]) for k in keys]
        runtime = {
            "ahead": self.schedule.ahead,
            "buffer_samples": len(self.buffer) - len(keys),
            "buffer_bytes": self.buffer.arena.used_bytes,
            "memory_bytes": self.fleet.memory(),
            **self.replays.cost(),
        }
        outcomes = {k: records.outcome(w) for k, w in zip(keys, report.stats.weight, strict=True)}
        self.schedule.ahead = self.control.learned(report)
        self.schedule.on_trained(report.step, outcomes)
        self.journal.trained(report, batch, {**runtime, "in_flight": self.schedule.in_flight})
        for key in keys:
            self._forget(key)
        step = self.schedule.step
        if (reason := self.control.stale(step, report.stats)) is not None:
            self._refresh(step, reason)
        if self.saver.due(step):
            self.saver.save(False, self._save_learner)

    def _refresh(self, step: int, reason: str) -> None:
        """Drop the buffer; what a teacher is at is let go when it answers."""
        dropped = self.schedule.refresh()
        self._abort_all()
        for key in dropped:
            if key in self.buffer and not self.buffer[key].scoring:
                self._forget(key)
        self.journal.refreshed(step, reason, dropped.values())

    def _abort_all(self) -> None:
        for spec in self.plan.samplers:
            if spec.name in self.fleet.workers:
                self._start(Abort(spec.rank))

    def _text(self, rollout: Rollout) -> str:
        """What is graded."""
        if rollout.answer is not None:
            return rollout.answer
        return hf.decode(self.tokenizer, rollout.last_turn)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _save_learner(self, folder: Path) -> dict[str, Any]:
        self._saved = []
        self.schedule.learner_busy = True
        self._to_all(self.plan.learners, m.SaveCommand(folder))
        while len(self._saved) < len(self.plan.learners):
            # At depth 0 nothing else starts meanwhile, so that a resumed run has the same samples to sample.
            self._advance(act=not self.schedule.config.deterministic and not self.schedule.paused)
        self.schedule.learner_busy = False
        for saved in self._saved:
            if saved.error:
                raise OSError(saved.error)
        return next(s.extra for s in self._saved if s.extra)
