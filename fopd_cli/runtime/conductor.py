"""Carries out what `schedule.py` decides, with a crew, and tells it the results.

    prompt ──> sampler ──Rollout──> teacher ──targets in the arena──> learner ──StepReport──> conductor
                  ^          └────────> grader ──grade──────────────────┘  │
                  └────────────── weights, version t, shared memory ───────┘

One thread, no CUDA context, no clock in its decisions. Its loop: start what the schedule allows (an action
becomes a command), then handle what happened (an event updates the schedule, the buffer, the journal). Each
handler's docstring says what it consumes and unblocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, assert_never

from fopd_cli.engines.models import hf
from fopd_cli.errors import Interrupted, UserError, WorkerError
from fopd_cli.runtime.buffer import Entry
from fopd_cli.runtime.crew import crew as engines
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Crew, Engine
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.journal import Journal, Measured
from fopd_cli.runtime.journal.saving import Saving
from fopd_cli.runtime.scheduling.conversations import Conversations
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.scheduling.reexecutions import Reexecutions
from fopd_cli.runtime.scheduling.tickets import (
    Action,
    Evaluate,
    Generate,
    Lease,
    Load,
    Reexecute,
    Score,
    Train,
)
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.samples import Prompt, Request, Rollout, SampleId, SampleStats, StepReport


class Conductor:
    """One run, from the start of its crew to its last checkpoint."""

    def __init__(self, state: State, crew: Crew, journal: Journal, saver: Saving, signals: Signals) -> None:
        self.state, self.crew, self.journal, self.saver, self.signals = state, crew, journal, saver, signals
        self.inputs, self.schedule, self.buffer = state.inputs, state.schedule, state.buffer
        self.recipe, self.stream = state.inputs.recipe, state.inputs.stream
        self.reexecutions = Reexecutions()
        self.conversations = self._conversations() if self.stream.episodic else None
        self._params = {
            "train": sampling_params(self.recipe, evaluation=False),
            "eval": sampling_params(self.recipe, evaluation=True),
        }
        self._save_due = False  # the learner waits for it
        self._fatal: m.EngineLost | None = None  # why the run has to end
        self.stopped_early: str | None = None  # why, if it was

    def _conversations(self) -> Conversations:
        return Conversations(
            self.inputs.tokenizer,
            lambda key: (self._prompt(key), self.schedule.tickets[key].version),
            lambda replica, requests: self.crew.send(engines.sampler(replica), m.GenerateCommand(requests)),
            lambda command: self.crew.send(engines.ENVIRONMENT, command),
            together=self.schedule.config.deterministic,
        )

    # ---- the loop ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end. Raises `Interrupted` after a signal, with a checkpoint written."""
        with self.crew:
            self.crew.start()
            self.saver.begin()
            self.journal.begin()
            self._grade(self.buffer.ungraded())  # from a checkpoint's buffer
            self.schedule.on_learner_ready()
            while not self.schedule.done and self.stopped_early is None:
                self._advance()
                if self.signals.received or self._fatal is not None:
                    self._leave()
            if self.stopped_early is not None:
                self._come_to_rest()
            self._save_last()

    def _advance(self, act: bool = True) -> None:
        """Start all that can start; handle what happened."""
        self._save_if_due()
        if act:
            self._start_all()
        for engine, event in self.crew.receive():
            self._handle(engine, event)
        self.saver.settle(wait=False)

    def _start_all(self) -> None:
        while actions := self.schedule.actions():
            for action in actions:
                self._start(action)

    def _come_to_rest(self) -> None:
        """Let the running step finish; samples in flight go into the checkpoint."""
        self.schedule.paused = True
        exclusive = self.schedule.config.exclusive
        if exclusive:
            self.schedule.abandon()
            self._abort_all()
        while self._learning or (exclusive and self.schedule.lease != "learner"):
            self._advance()

    @property
    def _learning(self) -> bool:
        return self.schedule.learner_busy or self.schedule.publishing

    def _leave(self) -> None:
        """After a signal, or a loss that the run cannot survive: save and end."""
        self._come_to_rest()
        self._save_last()
        self.crew.end_programs()
        how = self.saver.how_to_continue
        if self._fatal is None:
            raise Interrupted(
                f"stopped after step {self.schedule.step} of {self.recipe.learner.steps}; {how}"
            )
        if self._fatal.mistake:
            raise UserError(f"{self._fatal.reason}; fix this, then {how}")
        raise WorkerError(f"{self._fatal.reason}; {how}")

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        """Begin the save for which the learner waits, unless the one before is still being written, or its
        version is still being published. From `Staged` on the learner takes steps again.
        """
        if self._save_due and self.saver.may_begin and not self.schedule.publishing:
            self._save_due = False
            self.saver.settle(wait=True)
            staged = self.recipe.checkpoint.staged
            self.schedule.learner_busy = self.saver.save(False, lambda folder: self._ask(folder, staged))

    def _save_last(self) -> None:
        """The last save, while the learner is idle; returns when the run is on the disk as it is now."""
        self._await_save()
        if self.saver.save(True, lambda folder: self._ask(folder, staged=False)):
            self._await_save()

    def _await_save(self) -> None:
        while self.saver.writing:
            self._advance(act=False)
        self.saver.settle(wait=True)

    def _ask(self, folder: Path, staged: bool) -> None:
        self.crew.send(engines.LEARNER, m.SaveCommand(folder, staged))

    # ---- actions -------------------------------------------------------------------------------------------

    def _start(self, action: Action) -> None:
        match action:
            case Generate(replica, keys):
                self._generate(replica, [self._request(key) for key in keys])
            case Load(replica, version):
                self.crew.send(engines.sampler(replica), m.LoadCommand(version))
            case Score(teacher, keys, again):
                self._score(teacher, [self.buffer[key] for key in keys], again)
            case Reexecute(keys, now):
                self.reexecutions.begin(keys, holding=not self.schedule.learner_busy)
                for key in keys:
                    self.crew.send(engines.ENVIRONMENT, self._reexecute(key, now))
            case Train(step, keys):
                self.saver.let_train()
                self.journal.step_begins()
                self.crew.send(engines.LEARNER, m.TrainCommand(step, *self._batch(keys)))
            case Evaluate(_, keys):
                shown = [key for key in keys if self.stream.is_shown(self._sample(key))]
                self.crew.send(engines.LEARNER, m.EvaluateCommand(*self._batch(keys), shown))
            case Lease(sleeper, waker):
                self.crew.lease(sleeper, waker)
            case _:
                assert_never(action)

    def _generate(self, replica: int, requests: list[Request]) -> None:
        if self.conversations is None:
            self.crew.send(engines.sampler(replica), m.GenerateCommand(requests))
        else:
            self.conversations.start(replica, requests)

    def _request(self, key: int) -> Request:
        sample = self._sample(key)
        seed, params = sample.seed(self.recipe.seed), self._params[sample.split]
        return Request(key, self.stream.token_ids(sample), seed, params)

    def _score(self, teacher: int, entries: list[Entry], again: bool) -> None:
        for entry in entries:
            entry.scoring = True
            if again:
                self.buffer.let_score_again(entry.key)
        rollouts = [entry.judged(self.stream.told(self._sample(entry.key))) for entry in entries]
        command = m.ScoreCommand(rollouts, [entry.targets for entry in entries], again)
        self.crew.send(engines.teacher(teacher), command)

    def _reexecute(self, key: int, now: int) -> m.ReexecuteCommand:
        entry, told = self.buffer[key], self.stream.told(self._sample(key))
        template = self.recipe.teachers[entry.teacher].context
        return m.ReexecuteCommand(entry.rollout, self._prompt(key), told, template, now)

    def _batch(self, keys: Iterable[int]) -> tuple[list[Rollout], list[m.Region], list[int]]:
        """Rollouts, the regions of their targets, and their lags."""
        entries = [self.buffer[key] for key in keys]
        lags = [self.schedule.step - self.schedule.tickets[entry.key].version for entry in entries]
        return [entry.rollout for entry in entries], [entry.targets for entry in entries], lags

    def _sample(self, key: int) -> SampleId:
        return self.schedule.tickets[key].sample

    def _measured(self, key: int) -> Measured:
        sample = self._sample(key)
        return Measured(sample, self.buffer[key], self._prompt(key).held_out, self.stream.is_shown(sample))

    def _prompt(self, key: int) -> Prompt:
        return self.stream.prompt(self._sample(key))

    # ---- events --------------------------------------------------------------------------------------------

    def _handle(self, engine: Engine, event: m.Event) -> None:
        match event:
            case m.Worked(worker, span):
                self.journal.worked(worker, span)
            case m.Observed() | m.Reexecuted() | m.Graded() if self.signals.received:
                pass  # the programs behind it may have got the same signal; it is done again
            case m.Sampled(rollouts):
                self._on_sampled(engine.index, rollouts)
            case m.Loaded(version, span):
                self.journal.loaded(span)
                self.schedule.on_loaded(engine.index, version)
            case m.Observed():
                assert self.conversations is not None
                self._on_finished(self.conversations.on_observed(event))
            case m.Graded(grades):
                self._on_graded(grades)
            case m.Scored(keys):
                self._on_scored(engine.index, keys)
            case m.Reexecuted():
                self._on_reexecuted(event)
            case m.Trained(report):
                self._on_trained(report)
            case m.Published(version, nbytes, span):
                self._on_published(version, nbytes, span)
            case m.Evaluated(stats):
                self._on_evaluated(stats)
            case m.Staged():
                self.schedule.learner_busy = False
                self.reexecutions.hold()
            case m.Saved():
                self.saver.on_saved(event)
            case m.Leased(role):
                self.schedule.on_leased(role)
            case m.EngineLost():
                self._on_lost(engine, event)
            case m.EngineBack():
                self._on_back(engine)
            case _:
                assert_never(event)

    def _on_sampled(self, replica: int, rollouts: list[Rollout]) -> None:
        """What a sampler wrote: whole samples, or turns that unblock the environment."""
        if self.conversations is None:
            self._on_finished((replica, rollout) for rollout in rollouts)
        else:
            self._on_finished(self.conversations.on_turns(replica, rollouts))

    def _on_finished(self, finished: Iterable[tuple[int, Rollout]]) -> None:
        """Finished samples: to the grader now, to the teacher when the schedule says so."""
        kept = []
        for replica, rollout in finished:
            if self.schedule.on_sampled(replica, rollout.key, rollout.oldest_version):
                self.journal.sampled(rollout)
                kept.append(self.buffer.add(rollout, self.schedule.tickets[rollout.key].teacher))
        self._grade(kept)

    def _grade(self, entries: list[Entry]) -> None:
        """Send samples that must be graded to the grader; the learner waits for their grades."""
        for entry in [] if self.recipe.eval.training else entries:
            if self._sample(entry.key).split == "train":
                entry.grade = math.nan
                self.schedule.on_graded(entry.key)
        items = [(e.key, self._prompt(e.key), self._text(e.rollout)) for e in entries if e.grade is None]
        if items:
            self.crew.send(engines.GRADER, m.GradeCommand(items))

    def _text(self, rollout: Rollout) -> str:
        """The text to grade."""
        if rollout.answer is not None:
            return rollout.answer
        return hf.decode(self.inputs.tokenizer, rollout.last_turn)

    def _on_graded(self, grades: Iterable[tuple[int, float, dict[str, float]]]) -> None:
        for key, grade, metrics in grades:
            if key in self.buffer:
                self.buffer[key].grade, self.buffer[key].metrics = grade, metrics
                self.schedule.on_graded(key)

    def _on_scored(self, teacher: int, keys: list[int]) -> None:
        """Targets are complete; unblocks the learner, or a re-execution. Samples dropped meanwhile are
        forgotten.
        """
        for key in keys:
            self.buffer[key].scoring = False
        for key in self.schedule.on_scored(teacher, keys):
            self._forget(key)

    def _on_reexecuted(self, event: m.Reexecuted) -> None:
        """A sample's calls were executed again; the teacher is asked again if it has changed."""
        if event.key in self.buffer:
            changed = event.context is not None
            self.buffer[event.key].context = event.context
            self.reexecutions.end(event.key, changed, event.span.end - event.span.start)
            self.schedule.on_reexecuted(event.key, changed)

    def _on_evaluated(self, stats: SampleStats) -> None:
        """Held-out samples are evaluated; with the last of them the learner may train again."""
        version, keys = self.schedule.step, stats.keys.tolist()
        rows = [self._measured(key) for key in keys]
        self.journal.evaluated_samples(stats, rows)
        for key in keys:
            self._forget(key)
        if self.schedule.on_evaluated(version, keys):
            self.journal.evaluated(version)
            self.stopped_early = self.saver.keep_best(version)
        self.reexecutions.hold()

    def _on_trained(self, report: StepReport) -> None:
        """An optimizer step is done; unblocks the next one, which begins before this one is written down.
        (Samplers wait for its publication.)

        Its samples are recorded and forgotten; the buffer is dropped if it is stale.
        """
        keys = report.stats.keys.tolist()
        batch = [(self._sample(key), self.buffer[key]) for key in keys]
        outcomes = {k: records.outcome(w) for k, w in zip(keys, report.stats.weight, strict=True)}
        ahead, self.schedule.ahead = self.schedule.ahead, self.state.control.learned(report)
        self.schedule.on_trained(report.step, outcomes)
        runtime = {
            "seconds": self.journal.step_seconds,
            "ahead": ahead,
            **self._clock_metrics(),
            **self.reexecutions.cost(),
        }
        for key in keys:
            self._forget(key)
        step = self.schedule.step
        stale, saving = self.state.control.stale(step, report.stats), self.saver.due(step)
        if not saving:
            self.reexecutions.hold()
        if stale is None and not saving and self._may_go_on:
            self._start_all()
        self.journal.trained(report, batch, runtime)
        if stale is not None:
            self._refresh(step, stale)
        if saving:  # what is saved includes the record of this step
            self._save_due = self.schedule.learner_busy = True
            self._save_if_due()

    def _on_published(self, version: int, nbytes: int, span: m.Span) -> None:
        """A step's version is in its slot; unblocks samplers, and a save. They are told at once: if the next
        step has already ended, none may load during its own publication, and so on with those after it.
        """
        self.schedule.on_published(version)
        if self._may_go_on:
            self._start_all()
        self.journal.published(nbytes, span)

    @property
    def _may_go_on(self) -> bool:
        """Whether new work may start in the middle of handling what happened: not where roles change turns,
        and not if the run is about to end.
        """
        return not (self.schedule.config.exclusive or self.signals.received or self._fatal is not None)

    def _clock_metrics(self) -> dict[str, Any]:
        """Metrics from right after a step; they depend on the clock."""
        return {
            "buffer_samples": len(self.buffer) - self.recipe.learner.batch_samples,
            "buffer_bytes": self.buffer.arena.used_bytes,
            "in_flight": self.schedule.in_flight,
            "memory_bytes": self.crew.memory(),
            "device_bytes": self.crew.device_memory(),
        }

    def _refresh(self, step: int, reason: str) -> None:
        """Drop the buffer; samples that a teacher is scoring are forgotten when it answers."""
        dropped = self.schedule.refresh()
        self._abort_all()
        for key in dropped:
            if key in self.buffer and not self.buffer[key].scoring:
                self._forget(key)
        self.journal.refreshed(step, reason, dropped.values())

    def _abort_all(self) -> None:
        """Stop all running work of the samplers."""
        for replica in range(self.schedule.config.replicas):
            self.crew.send(engines.sampler(replica), m.AbortCommand())
            self._give_up(replica)

    def _give_up(self, replica: int) -> None:
        if self.conversations is not None:
            self.conversations.give_up(replica)

    def _on_lost(self, engine: Engine, event: m.EngineLost) -> None:
        """The engine's unfinished work is redone, by another one or by itself when it is back."""
        match engine.role:
            case "teacher":
                self._on_teacher_lost(engine.index)
            case "sampler":
                self.schedule.on_sampler_lost(engine.index)
                self._give_up(engine.index)
            case "environment":  # and with it the state of all episodes
                self.schedule.on_environment_lost()
                self.schedule.abandon()
                self._abort_all()
            case "grader" | "learner":  # ungraded samples go to the grader when it is back
                pass
            case _:
                assert_never(engine.role)
        if event.restarted:
            self.journal.totals.restarts += 1
        if event.fatal:
            self._fatal = event

    def _on_teacher_lost(self, index: int) -> None:
        """Its samples are scored again; those that a refresh had dropped meanwhile are forgotten."""
        for key in self.schedule.on_teacher_lost(index):
            self.buffer.release(key)
        for entry in [e for e in self.buffer.entries.values() if e.scoring and e.teacher == index]:
            entry.scoring = False
            if entry.key not in self.schedule.tickets:
                self._forget(entry.key)

    def _on_back(self, engine: Engine) -> None:
        match engine.role:
            case "teacher":
                self.schedule.on_teacher_back(engine.index)
            case "sampler":
                self.schedule.on_sampler_back(engine.index)
            case "grader":
                self._grade(self.buffer.ungraded())
            case "environment" | "learner":
                pass
            case _:
                assert_never(engine.role)

    def _forget(self, key: int) -> None:
        """Forget a sample, whatever its outcome."""
        self.buffer.forget(key)
        self.reexecutions.forget(key)
