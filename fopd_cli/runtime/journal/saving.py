"""When and how a run is saved, how it is resumed, and how the best student so far is kept.

A checkpoint is the learner's part (written by its ranks), the buffer, the schedule and the conductor's other
state, all as of the moment when the learner's part is on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from fopd_cli.errors import UserError
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, Rhythm, disk_error, write_synced
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.sinks import Changes, Resume
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.state import State

PUBLISHED = "published.bin"


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

    def save(self, final: bool, learner: Callable[[Path], dict[str, Any]]) -> None:
        """`learner` writes the learner's part into a folder, while the learner is idle; it returns the rest
        of its state, or raises OSError.
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

    def save(self, final: bool, learner: Callable[[Path], dict[str, Any]]) -> None: ...

    def keep_best(self, version: int) -> str | None:
        return None


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
            self.buffer.load(folder / "buffer.safetensors", state, teachers)
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

    def save(self, final: bool, learner: Callable[[Path], dict[str, Any]]) -> None:
        """The learner first, then everything else as of the moment when the learner's part is on disk.

        A full disk does not stop training: the older checkpoints remain, and a loud warning is given. Only
        the last save must succeed.
        """
        step = self.schedule.step
        if final and step == self._last:
            return
        temporary = self.store.begin(step)
        try:
            extra = learner(temporary / "learner")
            self._write_state(temporary, extra)
            self.store.commit(temporary)
            self._last = step
            if self.best is not None:
                known = (self.store.state(s)["totals"]["evaluations"] for s in self.store.steps())
                self.best.tidy([self.journal.totals.evaluations, *known])
        except OSError as error:
            self.store.discard(temporary)
            text = disk_error(error) or str(error)
            if final:
                last = "the beginning" if self._last is None else f"step {self._last}"
                raise UserError(
                    f"checkpoints: cannot save step {step}: {text}; free some disk space, then "
                    f"{self.how_to_continue} (from {last})"
                ) from None
            self.journal.warn(
                step, f"NO CHECKPOINT was written: {text}; training continues, older checkpoints are intact"
            )
        self._rhythm.saved()

    def _write_state(self, folder: Path, learner: dict[str, Any]) -> None:
        schedule = self.schedule.state_dict()
        kept = {t["key"] for t in schedule["tickets"] if t["state"] != "planned"}
        scored = {t["key"] for t in schedule["tickets"] if t["state"] == "scored"}
        if schedule["resume_version"] < schedule["step"]:
            self.channel.save(schedule["resume_version"], folder / PUBLISHED)
        given_up = [entry.rollout for key, entry in self.buffer.entries.items() if key not in kept]
        state = {
            "recipe": self.recipe.model_dump(mode="json"),
            "schedule": schedule,
            **self.control.state_dict(),
            "learner": learner,
            "student_dtype": _name(self.student_dtype),
            "published_dtypes": [_name(dtype) for _, _, dtype in self.channel.layout],
            "totals": self.journal.kept_totals(given_up),
            **self.buffer.save(folder / "buffer.safetensors", kept, scored),
        }
        write_synced(folder / "state.json", json.dumps(state))

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
