"""When and how a run is saved, how it is resumed, and how the best student so far is kept.

A checkpoint is the learner's part (written by its ranks), the buffer, the schedule and the conductor's other
state, all as of the step after which it was begun. The conductor waits for no disk; the checkpoint counts
once every part is on it:

    save ──> threads: write what the buffer held, and published weights ┐
      └────> learner: copy, go on training, write, hash ──on_saved──────┴──> thread: commit ──settle──> done
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fopd_cli.errors import UserError, disk_error
from fopd_cli.runtime.crew.messages import Saved
from fopd_cli.runtime.journal.beside import Beside
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, Rhythm
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.sinks import Changes, Resume
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.state import State

BUFFER, PUBLISHED = "buffer.safetensors", "published.bin"


class Saving(Protocol):
    """What a conductor needs."""

    @property
    def how_to_continue(self) -> str:
        """What to do after the run has stopped, as the end of a sentence."""
        ...

    def begin(self) -> None:
        """Every worker is ready."""

    def due(self, step: int) -> bool:
        """Whether to save after this optimizer step."""
        ...

    def save(self, final: bool, learner: Callable[[Path], None]) -> bool:
        """Begin a save of the run as it is now; none may be under way. `learner` has the learner, which is
        idle, write its part into a folder. Returns whether there is anything to save.
        """
        ...

    @property
    def writing(self) -> bool:
        """Whether a save was begun of which the learner has not said that its part is written."""
        ...

    @property
    def may_begin(self) -> bool:
        """Whether all parts of the last save are written: `settle` then waits for little more."""
        ...

    def let_train(self) -> None:
        """Call before the learner is told to take a step. Returns when the published weights that its version
        overwrites are saved, if they must be.
        """

    def on_saved(self, learner: Saved) -> None:
        """It has said so."""

    def settle(self, wait: bool) -> None:
        """Called now and then: take note of a checkpoint that is complete, or could not be completed. `wait`:
        of the one whose parts are all written.
        """

    def keep_best(self, version: int) -> str | None:
        """Called after an evaluation, while the learner is still idle and its published weights are in place.
        Returns why the run should end early; None: it should go on.
        """
        ...


class Unsaved:
    """For runs that are never resumed: a study's, a test's, a plan's."""

    how_to_continue = "start it again from the beginning (no checkpoints are written)"

    def begin(self) -> None: ...

    def due(self, step: int) -> bool:
        return False

    def save(self, final: bool, learner: Callable[[Path], None]) -> bool:
        return False

    @property
    def writing(self) -> bool:
        return False

    @property
    def may_begin(self) -> bool:
        return True

    def let_train(self) -> None: ...

    def on_saved(self, learner: Saved) -> None: ...

    def settle(self, wait: bool) -> None: ...

    def keep_best(self, version: int) -> str | None:
        return None


@dataclass
class _Save:
    """One under way. `state` is the run's own state at its step, without the learner's part."""

    step: int
    final: bool
    folder: Path  # not yet under its final name
    state: dict[str, Any]
    buffer: Beside[dict[str, Any]]
    published: Beside[None] | None  # where weights of before are saved
    commit: Beside[None] | None = None  # once the learner's part is written; waits for the others

    @property
    def own_parts(self) -> list[Beside[Any]]:
        return [part for part in (self.published, self.buffer) if part is not None]


class Saver:
    """Checkpoints of one run. `student_dtype` is the dtype in which the student samples and is evaluated."""

    def __init__(
        self,
        state: State,
        run_dir: RunDir,
        journal: Journal,
        channel: WeightChannel,
        student_dtype: torch.dtype,
    ) -> None:
        recipe = state.inputs.recipe
        self.recipe, self.run_dir, self.journal = recipe, run_dir, journal
        self.schedule, self.buffer, self.control = state.schedule, state.buffer, state.control
        self.channel, self.student_dtype = channel, student_dtype
        self.store = CheckpointStore(run_dir.checkpoints, recipe.checkpoint.keep)
        keep = recipe.eval.keep_best
        self.best = None if keep is None else Best(keep, recipe.eval.patience, run_dir.best)
        self._rhythm = Rhythm(recipe.checkpoint.every, recipe.checkpoint.minutes)
        self._save: _Save | None = None
        self._last: int | None = None  # step of the newest checkpoint
        self._resumed: int | None = None

    # ---- resuming ------------------------------------------------------------------------------------------

    def restore(
        self, step: int, state: Mapping[str, Any], changes: Changes, anew: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        """Load a checkpoint's state; returns the learner's part, which the learner reads itself when it
        starts. Nothing is written yet.

        `changes` to the recipe go into the history. `anew`: samples in flight are sampled again.
        """
        folder = self.store.path(step)
        self.schedule.load_state_dict(state["schedule"], anew)
        self.control.load_state_dict(state)
        self.schedule.ahead = self.control.ahead
        if not anew:
            teachers = {key: ticket.teacher for key, ticket in self.schedule.tickets.items()}
            self.buffer.load(folder / BUFFER, state, teachers)
        if (version := self.schedule.resume_version()) < step:
            dtypes = [getattr(torch, name) for name in state["published_dtypes"]]
            self.channel.load(version, folder / PUBLISHED, dtypes)
        resume = Resume(step, frozenset(self.schedule.evaluated))
        self.journal.resume(resume, state["totals"], changes)
        self._last = self._resumed = step
        return folder / "learner", state["learner"]

    @property
    def how_to_continue(self) -> str:
        return f"continue with: fopd resume {self.run_dir.path}"

    def begin(self) -> None:
        """Prepare the checkpoints' folder."""
        self.store.open(self._resumed)
        self._rhythm.saved()

    # ---- saving --------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        return step < self.recipe.learner.steps and self._rhythm.due(step)

    def save(self, final: bool, learner: Callable[[Path], None]) -> bool:
        """Everything as of now: the learner writes its part, or a copy of it, while threads write the rest.
        Returns when they are done if the learner, too, waits for the disk while the run goes on.

        A full disk does not stop training: the older checkpoints remain, and a loud warning is given. Only
        the last save must succeed.
        """
        assert self._save is None, "a save is under way"
        step = self.schedule.step
        if final and step == self._last:
            return False
        self._rhythm.saved()  # the next one is not due while this one is under way
        try:
            self.journal.flush()  # whoever resumes finds the records of all steps before
            folder = self.store.begin(step)
        except OSError as error:
            self._not_saved(step, final, str(error))
            return False
        learner(folder / "learner")
        self._save = self._begun(step, final, folder)
        if not (final or self.recipe.checkpoint.asynchronous):
            for part in self._save.own_parts:
                part.wait()
        return True

    @property
    def writing(self) -> bool:
        return self._save is not None and self._save.commit is None

    @property
    def may_begin(self) -> bool:
        return not self.writing and (self._save is None or all(part.over for part in self._save.own_parts))

    def let_train(self) -> None:
        if self._save is not None and self._save.published is not None:
            self._save.published.wait()

    def on_saved(self, learner: Saved) -> None:
        save = self._save
        assert save is not None
        save.commit = Beside(partial(self._complete, save, learner))

    def _complete(self, save: _Save, learner: Saved) -> None:
        """The last part of a save, in a thread: hash what is left, sync, rename, remove old ones."""
        for part in save.own_parts:  # else something would still be written into a folder that is discarded
            part.wait()
        if learner.error is not None:
            raise OSError(learner.error)
        if save.published is not None:
            save.published.result()
        files = {f"learner/{name}": entry for name, entry in learner.files.items()}
        files[BUFFER] = save.buffer.result()
        self.store.commit(save.folder, json.dumps({**save.state, "learner": learner.extra}), files)

    def settle(self, wait: bool) -> None:
        save = self._save
        if save is None or save.commit is None or not (wait or save.commit.over):
            return
        try:
            save.commit.result()
        except OSError as error:
            self._end(save, disk_error(error) or str(error))
            return
        self._end(save, None)

    def _end(self, save: _Save, error: str | None) -> None:
        self._save = None
        self._rhythm.saved()
        if error is not None:
            self.store.discard(save.folder)
            self._not_saved(save.step, save.final, error)
            return
        self._last = save.step
        if self.best is not None:
            known = (self.store.state(s)["totals"]["evaluations"] for s in self.store.steps())
            self.best.tidy([self.journal.totals.evaluations, *known])

    def _not_saved(self, step: int, final: bool, why: str) -> None:
        if final:
            last = "the beginning" if self._last is None else f"step {self._last}"
            raise UserError(
                f"checkpoints: cannot save step {step}: {why}; free some disk space, then "
                f"{self.how_to_continue} (from {last})"
            )
        self.journal.warn(
            step, f"NO CHECKPOINT was written: {why}; training continues, older checkpoints are intact"
        )

    def _begun(self, step: int, final: bool, folder: Path) -> _Save:
        """Copy what is small, and have threads write what is large: the buffer's targets, held as they are
        now, and published weights, whose slot is overwritten by the next step.
        """
        schedule = self.schedule.state_dict()
        kept = {t["key"] for t in schedule["tickets"] if t["state"] != "planned"}
        scored = {t["key"] for t in schedule["tickets"] if t["state"] == "scored"}
        given_up = [entry.rollout for key, entry in self.buffer.entries.items() if key not in kept]
        snapshot = self.buffer.snapshot(kept, scored)
        state = deepcopy(
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "schedule": schedule,
                **self.control.state_dict(),
                "student_dtype": _name(self.student_dtype),
                "published_dtypes": [_name(dtype) for _, _, dtype in self.channel.layout],
                "totals": self.journal.kept_totals(given_up),
                **snapshot.state,
            }
        )
        published = None
        if (version := schedule["resume_version"]) < step:
            published = Beside(partial(self.channel.save, version, folder / PUBLISHED))
        buffer = Beside(partial(snapshot.write, folder / BUFFER))
        return _Save(step, final, folder, state, buffer, published)

    # ---- the best student ----------------------------------------------------------------------------------

    def keep_best(self, version: int) -> str | None:
        evaluations = self.journal.totals.evaluations
        if self.best is None:
            return None
        if self.best.of(evaluations) == version:
            try:
                self.best.keep(version, self.channel)
            except OSError as error:
                text = f"the best student so far was NOT kept: {error}; training goes on"
                self.journal.warn(version, text)
        why = self.best.out_of_patience(evaluations) if version < self.recipe.learner.steps else None
        if why is not None:
            self.journal.warn(version, why)
        return why


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
