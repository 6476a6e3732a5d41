"""Drives `schedule.py` with real workers: carries out its actions, tells it what came back, writes down what
happened.

    prompt ──> sampler ──Rollout──> teacher ──targets in the arena──> learner ──StepReport──> conductor
                  ^          └────────> grader ──grade──────────────────┘  │
                  └────────────── weights, version t, shared memory ───────┘

One thread, no CUDA context, no clock in its decisions. Its loop: start what the schedule allows, wait for
messages, handle each. What a handler consumes and unblocks is said at the handler.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
import uuid
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.models import hf
from fopd_cli.errors import Interrupted, UserError, WorkerError
from fopd_cli.freshness.depth import Depth
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.freshness.refresh import Refresh
from fopd_cli.recipe import Recipe, dump_recipe
from fopd_cli.runtime.build import Setup, sampler_dtype
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew import roles
from fopd_cli.runtime.crew.fleet import STARTERS, Fleet, Worker, WorkerSpec
from fopd_cli.runtime.crew.restarts import REPLACEABLE, Restarts
from fopd_cli.runtime.crew.warm import STOPPING
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.journal.checkpoint import (
    CheckpointStore,
    Rhythm,
    disk_error,
    load_buffer,
    save_buffer,
    write_synced,
)
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.sinks import JsonLines, Progress, Resume, Telemetry
from fopd_cli.runtime.journal.watch import Watch
from fopd_cli.runtime.memory.arena import Arena
from fopd_cli.runtime.memory.sizes import arena_bytes
from fopd_cli.runtime.memory.weights import Layout, WeightChannel
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.episodes import Episodes
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.scheduling.prompts import PromptStream, context_tokens, evaluation_ids, schedule_config
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
from fopd_cli.samples import Request, Rollout, SampleId, SampleStats, TargetSpec
from fopd_cli.tasks.replay import cached

MAINS = {
    "learner": roles.learner_main,
    "teacher": roles.teacher_main,
    "sampler": roles.sampler_main,
    "grader": roles.grader_main,
    "environment": roles.environment_main,
}
PUBLISHED = "published.bin"
ENVIRONMENT = WorkerSpec("environment", 0, 1, (), 1)
# `timeout` sends its signal to the command and then to the whole group: what comes so soon after the first is
# the same.
SAME_SIGNAL_S = 0.3


@dataclass
class Totals:
    """Sums over the whole run, restarts included; saved with the checkpoint."""

    wall_seconds: float = 0.0
    generated_tokens: int = 0
    trained_tokens: int = 0
    freshness_sum: float = 0.0
    samples: int = 0
    max_lag: int = 0
    skipped_steps: int = 0
    restarts: int = 0  # of everyone but the learner
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # by version


@dataclass
class Model:
    """What the conductor knows of student and teachers without loading them."""

    tokenizer: Any
    vocab: int
    target_specs: tuple[TargetSpec, ...]
    layout: Layout
    tables: tuple[np.ndarray | None, ...]  # of each teacher: the student's token id -> the teacher's


class Conductor:
    """One run, from spawn to summary."""

    def __init__(
        self, recipe: Recipe, run_dir: RunDir, plan: Plan, stream: PromptStream, model: Model
    ) -> None:
        self.recipe, self.run_dir, self.plan, self.stream, self.model = recipe, run_dir, plan, stream, model
        self.store = CheckpointStore(run_dir.checkpoints, recipe.checkpoint.keep)
        self.arena = Arena(arena_bytes(recipe, model.target_specs))
        policy = POLICIES[recipe.freshness.policy]
        r = recipe.freshness.refresh
        self.refresh = Refresh(
            policy.refresh, r.mean, r.coverage_roll, r.coverage_sup, r.every_at_least, r.every
        )
        self.watch = Watch(recipe.learner.clip)
        keep = recipe.eval.keep_best
        self.best = None if keep is None else Best(keep, recipe.eval.patience, run_dir.best)
        self._stopped_early: str | None = None
        self.depth = Depth(recipe.max_lag, recipe.max_drift)
        self.schedule = Schedule(
            schedule_config(recipe, len(plan.samplers), plan.exclusive, stream.replayable),
            stream.train_id,
            evaluation_ids(recipe, stream),
            self._reserve,
            self._release,
            stream.teacher,
        )
        self.schedule.ahead = self.depth.now
        self.setup = Setup(
            recipe,
            model.vocab,
            model.target_specs,
            model.tables,
            context_tokens(recipe, stream, judged=False),
            context_tokens(recipe, stream, judged=True),
            self.arena.memory,
            WeightChannel.create(model.layout),
            run_dir.path / f".rendezvous-{uuid.uuid4().hex[:8]}",
        )
        self.totals = Totals()
        self.rollouts: dict[int, Rollout] = {}
        self.slots: dict[int, m.Slot] = {}
        self.grades: dict[int, float] = {}
        self.figures: dict[int, dict[str, float]] = {}  # what graders said beside the grade
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
        self._load: dict[str, float] = {}  # a sampler's latest weight update
        self._eval: dict[int, tuple[SampleId, float, Rollout]] = {}
        self._eval_figures: list[dict[str, float]] = []
        self._eval_stats: list[SampleStats] = []
        self._interrupts = 0
        self._interrupted_at = -math.inf
        self._resume: Resume | None = None
        self._recipe_changes: dict[str, tuple[Any, Any]] = {}
        self._rhythm = Rhythm(recipe.checkpoint.every, recipe.checkpoint.minutes)
        self._last_saved: int | None = None
        self._step_began = time.time()
        self._version_since = time.time()  # when the newest version was there, to be evaluated if that is due

    # ---- life ----------------------------------------------------------------------------------------------

    def restore(
        self, step: int, state: dict[str, Any], recipe_changes: dict[str, tuple[Any, Any]], anew: bool = False
    ) -> None:
        """Take up a checkpoint's state; the learner reads its own part when it starts. Nothing is written
        yet.

        `recipe_changes` go down in the history. `anew`: what was in flight is sampled again.
        """
        folder = self.store.path(step)
        self.schedule.load_state_dict(state["schedule"], anew)
        self.refresh.last = state["refresh_last"]
        self.schedule.ahead = self.depth.resume(**state["depth"])
        self.totals = Totals(**state["totals"])
        self.grades = {} if anew else {int(k): v for k, v in state["grades"].items()}
        rollouts, targets = load_buffer(folder / "buffer.safetensors", [] if anew else state["rollouts"])
        for rollout in rollouts:
            self.rollouts[rollout.key] = rollout
        for key, raw in targets.items():
            offset = self.arena.allocate(len(raw))
            if offset is None:
                raise UserError("teacher.buffer_gb: too small for the buffer in the checkpoint; raise it")
            self.arena.memory[offset : offset + len(raw)] = torch.from_numpy(raw)
            self.slots[key] = m.Slot(
                offset, self.rollouts[key].response_length, self.schedule.tickets[key].teacher
            )
        self.setup.restore = (folder / "learner", state["learner"])
        if (version := self.schedule.resume_version()) < step:
            dtypes = [getattr(torch, name) for name in state["published_dtypes"]]
            self.setup.channel.load(version, folder / PUBLISHED, dtypes)
        self._recipe_changes = recipe_changes
        self._resume = Resume(step, frozenset(self.schedule.evaluated))
        self._last_saved = step

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary. Ctrl-C, SIGTERM or a closed terminal: checkpoint and stop;
        again: stop now.
        """
        began = time.time() - self.totals.wall_seconds
        limits = self.recipe.runtime
        self.progress = Progress(self.recipe.learner.steps, self._resume.step if self._resume else 0)
        # With nohup a terminal that closes is none of our business.
        ours = [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
        previous = {s: signal.signal(s, self._on_signal) for s in ours}
        try:
            with Fleet(self.run_dir.logs, limits.timeout_s, limits.start_timeout_s) as self.fleet:
                self._start_workers()
                self.telemetry = self._records()
                self._grade_the_rest()  # of a checkpoint's buffer
                self.schedule.on_learner_ready()
                while not self.schedule.done and self._stopped_early is None:
                    self._advance()
                    self.totals.wall_seconds = time.time() - began
                    if self._interrupts or self._failure:
                        self._leave(began)
                if self._stopped_early is not None:
                    self._come_to_rest(began)
                self._save_checkpoint(final=True)
            return self._finish(began)
        finally:
            self.progress.close()
            if hasattr(self, "telemetry"):
                self.telemetry.close()
            for number, handler in previous.items():
                # On the way out after a Ctrl-C another one must not turn a clean end into a torn one.
                signal.signal(number, signal.SIG_IGN if self._interrupts else handler)
            for path in self.run_dir.path.glob(".rendezvous-*"):
                path.unlink()

    def _records(self) -> Telemetry:
        """Everyone stands: from here on the directory says what this run does, not what the one before
        did.
        """
        self.store.open(None if self._resume is None else self._resume.step)
        if self._resume is not None:
            text = dump_recipe(self.recipe)
            if text != self.run_dir.recipe.read_text(encoding="utf-8"):
                write_synced(self.run_dir.recipe, text)
            if self._recipe_changes or self.run_dir.history.exists():
                history = JsonLines(self.run_dir.history, self._resume)
                if self._recipe_changes:
                    history.write({"step": self._resume.step, "changed": self._recipe_changes})
                history.close()
        self._rhythm.saved()
        return Telemetry(self.run_dir.path, self.progress, self._resume)

    def _advance(self, act: bool = True) -> None:
        """One turn of the loop."""
        while act and (actions := self.schedule.actions()):
            for action in actions:
                self._start(action)
        for worker, message in self.fleet.receive(timeout=0.5):
            self._handle(worker, message)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - self._interrupted_at < SAME_SIGNAL_S:
            return
        self._interrupts, self._interrupted_at = self._interrupts + 1, now
        if self._interrupts > 1:
            raise Interrupted("stopped at once; the last checkpoint stands")
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            self.progress.say(
                "stopping: the running optimizer step is finished and a checkpoint written (again: stop now)"
            )

    def _come_to_rest(self, began: float) -> None:
        """Let the running step end; what is in flight goes into the checkpoint."""
        self.schedule.paused = True
        if self.plan.exclusive:
            self.schedule.abandon()
            self._abort_all()
        while self.schedule.learner_busy or (self.plan.exclusive and self.schedule.lease != "learner"):
            self._advance()
        self.totals.wall_seconds = time.time() - began

    def _leave(self, began: float) -> None:
        """After Ctrl-C, or without samplers or a teacher: save and go."""
        self._come_to_rest(began)
        self._save_checkpoint(final=True)
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
        self.progress.say(f"starting {self.plan.describe()}")
        waiting: set[str] = set()
        for role in ("learner", "teacher", "sampler", "grader", "environment"):
            specs = self._specs(role)
            for spec in specs:
                self._spawn(spec)
                waiting.add(spec.name)
            if self.plan.shared and role not in ("grader", "environment"):
                self._await(waiting, m.Ready)
            if self.plan.exclusive and role not in ("grader", "environment"):
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
            if self._interrupts and not self._changing_turns:
                raise Interrupted(
                    "stopped before the first step; nothing was trained since the last checkpoint"
                )
            if self._interrupts and kind is m.Ready:
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
                command = m.ScoreCommand(
                    [self._judged(k) for k in keys], [self.slots[k] for k in keys], again
                )
                self._score_answers.append([teacher, keys, len(self.plan.teachers[teacher])])
                self._to_all(self.plan.teachers[teacher], command)
            case Replay(keys, now):
                self.replays.begin(keys, holding=not self.schedule.learner_busy)
                for key in keys:
                    self._replay(key, now)
            case Train(step, keys):
                self._step_began = time.time()
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

    def _judged(self, key: int) -> Rollout:
        """A rollout with the context on which its teacher is to judge it."""
        rollout = self.rollouts[key]
        told = self.stream.told(self.schedule.tickets[key].sample)
        if (current := self.replays.contexts.get(key)) is None and told is not None:
            current = cached(rollout, told)
        return rollout if current is None else replace(rollout, context=current)

    def _replay(self, key: int, now: int) -> None:
        ticket = self.schedule.tickets[key]
        sample, template = ticket.sample, self.recipe.teachers[ticket.teacher].context
        command = m.ReplayCommand(
            self.rollouts[key], self.stream.prompt(sample), self.stream.told(sample), template, now
        )
        self.fleet.send(ENVIRONMENT.name, command, answers=0)

    def _learn(self, step: int | None, keys: tuple[int, ...]) -> None:
        lags = [self.schedule.step - self.schedule.tickets[k].version for k in keys]
        command = m.TrainCommand(step, [self.rollouts[k] for k in keys], [self.slots[k] for k in keys], lags)
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

    def _reserve(self, keys: tuple[int, ...]) -> bool:
        """Room in the arena for the targets of all these samples, or for none."""
        taken: list[int] = []
        for key in keys:
            positions = self.rollouts[key].response_length
            teacher = self.schedule.tickets[key].teacher
            offset = self.arena.allocate(self.model.target_specs[teacher].nbytes(positions))
            if offset is None:
                for other in taken:
                    self._release(other)
                return False
            self.slots[key] = m.Slot(offset, positions, teacher)
            taken.append(key)
        return True

    def _release(self, key: int) -> None:
        self.arena.free(self.slots.pop(key).offset)

    def _forget(self, key: int) -> None:
        """A sample is done with, whatever became of it."""
        self.rollouts.pop(key, None)
        self.grades.pop(key, None)
        self.figures.pop(key, None)
        self.replays.forget(key)
        if key in self.slots:
            self._release(key)

    # ---- messages ------------------------------------------------------------------------------------------

    def _handle(self, worker: Worker, message: Any) -> None:
        if not isinstance(message, m.Lost) and self.fleet.workers.get(worker.name) is not worker:
            return  # said before it was lost; what it had under way is done again
        for span in getattr(message, "spans", None) or ([message.span] if hasattr(message, "span") else []):
            self.telemetry.span(worker.name, span)
        match message:
            case m.Sampled() if message.aborts < worker.aborts:
                pass  # said before it knew that these are aborted; they may be under way anew
            case m.Sampled():
                finished = message.rollouts if self.episodes is None else self._on_turns(message.rollouts)
                self._on_sampled(worker.spec.rank, finished)
                self._next_turns(worker.spec.rank)
            case m.Observed() | m.Replayed() | m.Graded() if self._interrupts:
                pass  # the programs behind it may have got the same signal; it is done again
            case m.Observed():
                self._on_observed(message)
            case m.Loaded():
                self._load = {f"load_{k}": message.span.args[k] for k in ("ms", "gb_per_s")}
                self.schedule.on_loaded(worker.spec.rank, message.version)
                self._sampler_owes(worker.spec.rank)
            case m.Replayed():
                if message.key in self.rollouts:
                    self.replays.end(message)
                    self.schedule.on_replayed(message.key, message.context is not None)
            case m.Graded():
                for key, grade, figures in message.grades:
                    if key in self.rollouts:
                        self.grades[key], self.figures[key] = grade, figures
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
                self.totals.generated_tokens += _generated(rollout)
                self.rollouts[rollout.key] = rollout
                kept.append(rollout)
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
            text = hf.decode_turn(self.model.tokenizer, turn.response_ids)
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

    def _grade_the_rest(self) -> None:
        """All samples at hand that no grader has graded."""
        self._grade([r for k, r in self.rollouts.items() if k not in self.grades])

    def _grade(self, rollouts: list[Rollout]) -> None:
        if not self.recipe.eval.training:
            for rollout in rollouts:
                if self.schedule.tickets[rollout.key].sample.split == "train":
                    self.grades[rollout.key], self.figures[rollout.key] = math.nan, {}
                    self.schedule.on_graded(rollout.key)
            rollouts = [r for r in rollouts if r.key not in self.grades]
        # else the run is ending, or it is told when it is back
        if rollouts and "grader-0" in self.fleet.workers:
            samples = [self.schedule.tickets[r.key].sample for r in rollouts]
            items = [
                (r.key, self.stream.prompt(s), self._text(r)) for r, s in zip(rollouts, samples, strict=True)
            ]
            self.fleet.send("grader-0", m.GradeCommand(items))

    def _on_scored(self, teacher: int, keys: list[int]) -> None:
        """A teacher call is complete when all its ranks have answered."""
        entry = next(e for e in self._score_answers if e[0] == teacher and list(e[1]) == keys)
        entry[2] -= 1
        if entry[2] == 0:
            self._score_answers.remove(entry)
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
                self._release(key)
            self._drop_calls(spec.index)
        elif spec.role == "sampler":
            self.schedule.on_sampler_lost(spec.rank)
            self._give_up(spec.rank)
        elif spec.role == "environment":  # and with it the state of all episodes
            self.schedule.on_environment_lost()
            self.schedule.abandon()
            self._abort_all()
        if self._interrupts:
            self.progress.say(f"{reason}; the run is ending")
            return
        if lost.mistake:
            self._failure, self._mistake = reason, True
            return
        again = self.restarts.again(spec)
        if not again:
            self.progress.say(
                f"{reason}; started again {self.restarts.limit} times (runtime.restarts), it stays away"
            )
            if self.restarts.nobody_left(spec.role):
                self._failure = f"{reason}; there is no other {spec.role}"
            return
        self.totals.restarts += 1
        self.progress.say(
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
            self._grade_the_rest()

    def _drop_calls(self, teacher: int) -> None:
        """Forget what a lost teacher was asked; samples that a refresh had dropped meanwhile are let go for
        good.
        """
        for entry in [e for e in self._score_answers if e[0] == teacher]:
            self._score_answers.remove(entry)
            for key in entry[1]:
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
            self._on_trained(self._first_answer)
        self.replays.hold()

    def _on_measured(self, stats: SampleStats) -> None:
        version = self.schedule.step
        self._eval_stats.append(stats)
        for key in stats.keys.tolist():
            self._eval[key] = (self.schedule.tickets[key].sample, self.grades[key], self.rollouts[key])
            self._eval_figures.append(self.figures[key])
            self._forget(key)
        if self.schedule.on_measured(version, stats.keys.tolist()):
            record = records.evaluation(
                version, self._eval_stats, list(self._eval.values()), self._eval_figures
            )
            self.totals.evaluations[str(version)] = record
            tools = records.tool_seconds([r for _, _, r in self._eval.values()])
            seconds = time.time() - self._version_since
            timing = {**tools, "seconds": seconds, "wall_seconds": self.totals.wall_seconds}
            self.telemetry.metrics.write({**record, "timing": timing})
            self.telemetry.scalars(
                {f"eval/{k}": v for k, v in record.items() if isinstance(v, float)}, version
            )
            for key in sorted(self._eval)[:2]:
                sample, grade, rollout = self._eval[key]
                self._write_sample(version, sample, grade, rollout)
            self.progress.say(records.evaluation_line(record))
            self._eval, self._eval_stats, self._eval_figures = {}, [], []
            self._look_at_best(version)

    def _look_at_best(self, version: int) -> None:
        """After an evaluation, while the learner still holds still and its weights lie where they were
        published.
        """
        evaluations = self.totals.evaluations
        if self.best is None:
            return
        if self.best.of(evaluations) == version:
            try:
                self.best.keep(version, self.setup.channel)
            except OSError as error:
                self.telemetry.warn(
                    version, f"the best student so far was NOT kept: {error}; training goes on"
                )
        if version < self.recipe.learner.steps and (why := self.best.out_of_patience(evaluations)):
            self._stopped_early = why
            self.telemetry.warn(version, why)

    def _on_trained(self, message: m.Trained) -> None:
        """An optimizer step and its publication are done: count its samples, write the step down, refresh if
        stale.
        """
        report, stats = message.report, message.report.stats
        keys = stats.keys.tolist()
        outcomes = {k: records.outcome(w) for k, w in zip(keys, stats.weight, strict=True)}
        samples = {k: self.schedule.tickets[k].sample for k in keys}
        rollouts = [self.rollouts[k] for k in keys]
        self._count(stats, report.skipped)
        ahead = self.schedule.ahead
        self.schedule.ahead = self.depth.update(stats.lag, report.drift_above_floor)
        self.schedule.on_trained(report.step, outcomes)
        self._version_since = time.time()
        step = self.schedule.step
        timing = {
            "seconds": time.time() - self._step_began,
            "busy": self.telemetry.busy_shares(),
            "buffer_samples": len(self.rollouts) - len(keys),
            "buffer_bytes": self.arena.used_bytes,
            "in_flight": self.schedule.in_flight,
            "ahead": ahead,
            "memory_bytes": self.fleet.memory(),
            "publish_seconds": report.publish_seconds,
            "publish_bytes": report.publish_bytes,
            "publish_gb_per_s": report.publish_bytes / 1e9 / max(report.publish_seconds, 1e-9),
            **self.replays.cost(),
            **records.tool_seconds(rollouts),
            "wall_seconds": self.totals.wall_seconds,
            **self._load,
        }
        record = records.step(step, report, rollouts, [self.grades[k] for k in keys])
        self.telemetry.metrics.write({**record, "timing": timing})
        self.telemetry.ledger.write(records.ledger(step, samples, outcomes))
        self.telemetry.scalars(records.scalars(record, timing), step)
        self.telemetry.histograms(records.histograms(stats), step)
        self.progress.step(step, records.bar(record, timing))
        for warning in self.watch.step(report.grad_norm, record["kl"], record["kl_by_quartile"]):
            self.telemetry.warn(step, warning)
        if step % max(1, self.recipe.learner.steps // 20) == 0:
            self._write_sample(step, samples[keys[0]], self.grades[keys[0]], rollouts[0])
        for key in keys:
            self._forget(key)
        self._maybe_refresh(stats)
        if step < self.recipe.learner.steps and self._rhythm.due(step):
            self._save_checkpoint(final=False)

    def _count(self, stats: SampleStats, skipped: bool) -> None:
        self.totals.trained_tokens += int(stats.length[stats.weight > 0].sum())
        self.totals.freshness_sum += float(stats.freshness.sum())
        self.totals.samples += len(stats.keys)
        self.totals.max_lag = max(self.totals.max_lag, int(stats.lag.max()))
        self.totals.skipped_steps += skipped

    def _maybe_refresh(self, stats: SampleStats) -> None:
        step = self.schedule.step
        if step == self.recipe.learner.steps:
            return
        reason = self.refresh.reason(
            step,
            float(stats.freshness.mean()),
            float(stats.coverage_roll.mean()),
            float(stats.coverage_sup.mean()),
        )
        if reason is None:
            return
        self.refresh.last = step
        scoring = {k for _, keys, _ in self._score_answers for k in keys}
        dropped = self.schedule.refresh()
        self._abort_all()
        for key in dropped:
            if key not in scoring:
                self._forget(key)
        ids = [str(sample) for sample in dropped.values()]
        self.telemetry.metrics.write(
            {"kind": "refresh", "step": step, "reason": reason, "timing": {"dropped": len(ids)}}
        )
        self.telemetry.ledger.write({"step": step, "refreshed": ids})
        self.progress.say(f"step {step}: refreshing the buffer ({reason}); {len(ids)} samples dropped")

    def _abort_all(self) -> None:
        for spec in self.plan.samplers:
            if spec.name in self.fleet.workers:
                self._start(Abort(spec.rank))

    def _text(self, rollout: Rollout) -> str:
        """What is graded."""
        if rollout.answer is not None:
            return rollout.answer
        return hf.decode(self.model.tokenizer, rollout.last_turn)

    def _write_sample(self, step: int, sample: SampleId, grade: float, rollout: Rollout) -> None:
        prompt = hf.decode(self.model.tokenizer, rollout.token_ids[: rollout.prompt_length])
        self.telemetry.samples.write(
            {
                "kind": sample.split,
                "step": step,
                "sample": str(sample),
                "versions": rollout.spans,
                "prompt": prompt,
                "response": hf.decode(self.model.tokenizer, rollout.response_ids),
                "score": grade,
                "finish": rollout.finish,
                **({"turns": rollout.turns, "calls": rollout.calls} if rollout.turns else {}),
            }
        )

    # ---- checkpoints and the end ---------------------------------------------------------------------------

    def _save_checkpoint(self, final: bool) -> None:
        """Learner first, while it holds still; then everything else as it stands when the learner's part is
        on disk.

        A disk that is full does not stop training: the older checkpoints stand, and it is said loudly. Only
        the last save must succeed.
        """
        step = self.schedule.step
        if final and step == self._last_saved:
            return
        temporary = self.store.begin(step)
        try:
            extra = self._save_learner(temporary / "learner")
            self._save_state(temporary, extra)
            self.store.commit(temporary)
            self._last_saved = step
            if self.best is not None:
                known = (self.store.state(s)["totals"]["evaluations"] for s in self.store.steps())
                self.best.tidy([self.totals.evaluations, *known])
        except OSError as error:
            self.store.discard(temporary)
            text = disk_error(error) or str(error)
            if final:
                raise UserError(
                    f"checkpoints: cannot save step {step}: {text}; free some space, then: fopd resume "
                    f"{self.run_dir.path} "
                    f"(goes on from {self._last_saved if self._last_saved is not None else 'the start'})"
                ) from None
            self.telemetry.warn(
                step, f"NO CHECKPOINT was written: {text}; training goes on, older ones stand"
            )
        self._rhythm.saved()

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

    def _save_state(self, folder: Path, learner: dict[str, Any]) -> None:
        schedule = self.schedule.state_dict()
        known = {t["key"] for t in schedule["tickets"] if t["state"] != "planned"}
        scored = {t["key"] for t in schedule["tickets"] if t["state"] == "scored"}
        memory = self.arena.memory.numpy()
        targets = {}
        for key in sorted(scored):
            slot = self.slots[key]
            nbytes = self.model.target_specs[slot.teacher].nbytes(slot.positions)
            targets[key] = memory[slot.offset : slot.offset + nbytes]
        rollouts = [self.rollouts[k] for k in sorted(known)]
        if schedule["resume_version"] < schedule["step"]:
            self.setup.channel.save(schedule["resume_version"], folder / PUBLISHED)
        lost = [r for k, r in self.rollouts.items() if k not in known] + [
            r for _, _, r in self._eval.values()
        ]
        again = sum(map(_generated, lost))  # a half-done evaluation begins anew, too
        state = {
            "recipe": self.recipe.model_dump(mode="json"),
            "schedule": schedule,
            "refresh_last": self.refresh.last,
            "depth": {"now": self.depth.now, "waited": self.depth.waited},
            "learner": learner,
            "student_dtype": str(sampler_dtype(self.recipe, self.plan)).removeprefix("torch."),
            "published_dtypes": [str(dtype).removeprefix("torch.") for _, _, dtype in self.model.layout],
            "totals": {**vars(self.totals), "generated_tokens": self.totals.generated_tokens - again},
            "grades": {k: self.grades[k] for k in known if k in self.grades},
            "rollouts": save_buffer(folder / "buffer.safetensors", rollouts, targets),
        }
        write_synced(folder / "state.json", json.dumps(state))

    def _finish(self, began: float) -> dict[str, Any]:
        from fopd_cli.export import export_kept, export_student

        best = None if self.best is None else self.best.of_kept(self.totals.evaluations)
        if self.run_dir.student.exists():  # of an end before this one
            shutil.rmtree(self.run_dir.student)
        if self.best is None or best is None:
            step = export_student(self.run_dir, self.run_dir.student, None)
        else:
            step = best
            dtype = sampler_dtype(self.recipe, self.plan)
            export_kept(self.run_dir, self.run_dir.student, best, self.best.file(best), dtype)
        self.totals.wall_seconds = time.time() - began
        busy = self.telemetry.busy_shares_total()
        chosen = {
            "student_step": step,
            "student_chosen_by": "last" if self.best is None or best is None else self.best.metric,
            "stopped_early": self._stopped_early,
        }
        summary = {**records.summary(self.schedule, self.totals, busy), **chosen}
        write_synced(self.run_dir.summary, json.dumps(summary, indent=1) + "\n")
        return summary


def _generated(rollout: Rollout) -> int:
    """Tokens that the student sampled; in an episode observations stand between them."""
    return int(rollout.loss_mask.sum())
