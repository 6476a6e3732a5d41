"""The samples of a run, from the sampler until the learner is done with them, one entry each.

    add ──> reserve (room for the teacher's targets) ──> grade, context ──> forget

The schedule knows which sample it is and what may be done with it; its data is here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fopd_cli.errors import UserError
from fopd_cli.runtime.crew.messages import Region
from fopd_cli.runtime.journal.buffer_file import load_buffer, rollout_fields, write_buffer
from fopd_cli.runtime.memory.arena import Arena
from fopd_cli.runtime.memory.held import Held
from fopd_cli.samples import Context, Rollout, TargetSpec
from fopd_cli.tasks.replay import judged_context


@dataclass
class Entry:
    """One sample. `teacher` is the number of the teacher that judges it."""

    rollout: Rollout
    teacher: int
    region: Region | None = None  # where its targets are, once there is room for them
    scoring: bool = False  # a teacher has been asked and has not answered
    grade: float | None = None  # None: not graded yet; nan: cannot be graded
    metrics: dict[str, float] = field(default_factory=dict)  # the grader's further metrics
    context: Context | None = None  # today's, if it has changed since the sample was judged

    @property
    def key(self) -> int:
        return self.rollout.key

    @property
    def targets(self) -> Region:
        """Where its targets are; room must have been reserved."""
        assert self.region is not None
        return self.region

    @property
    def score(self) -> float:
        """The grade of a sample that has one."""
        assert self.grade is not None
        return self.grade

    def judged(self, told: np.ndarray | None) -> Rollout:
        """The rollout with the context on which its teacher must judge it now; `told` holds int32 ids of the
        prompt as the teacher reads it, None: as the student does.
        """
        context = self.context
        if context is None and told is not None:
            context = judged_context(self.rollout, told)
        return self.rollout if context is None else replace(self.rollout, context=context)


@dataclass(frozen=True)
class Snapshot:
    """Samples and their targets as they were when it was made. `state` is the rest of them, as JSON."""

    state: dict[str, Any]
    rollouts: list[Rollout]
    targets: Held

    def write(self, path: Path) -> dict[str, Any]:
        """In any thread, once: see `write_buffer`."""
        try:
            return write_buffer(path, self.rollouts, self.targets)
        finally:
            self.targets.let_go()


class Buffer:
    """All current samples, by key, and the shared memory for their targets. `specs` has one entry per
    teacher.
    """

    def __init__(self, specs: tuple[TargetSpec, ...], nbytes: int) -> None:
        self.specs, self.arena = specs, Arena(nbytes)
        self.entries: dict[int, Entry] = {}
        self._held: Held | None = None  # what the last snapshot holds

    def __contains__(self, key: int) -> bool:
        return key in self.entries

    def __getitem__(self, key: int) -> Entry:
        return self.entries[key]

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, rollout: Rollout, teacher: int) -> Entry:
        """A sampler has finished this rollout."""
        entry = self.entries[rollout.key] = Entry(rollout, teacher)
        return entry

    def reserve(self, keys: Iterable[int]) -> bool:
        """Reserve room for the targets of all these samples, or for none; returns whether it did."""
        taken: list[int] = []
        for key in keys:
            if not self._allocate(self.entries[key]):
                for other in taken:
                    self.release(other)
                return False
            taken.append(key)
        return True

    def _allocate(self, entry: Entry) -> bool:
        positions = entry.rollout.response_length
        offset = self.arena.allocate(self.specs[entry.teacher].nbytes(positions))
        if offset is not None:
            entry.region = Region(offset, positions, entry.teacher)
            self._let_write(entry.region)
        return offset is not None

    def let_score_again(self, key: int) -> None:
        """Call before a teacher changes targets that were complete."""
        self._let_write(self.entries[key].targets)

    def _let_write(self, region: Region) -> None:
        if self._held is not None:
            self._held.let_write(*self._place(region))

    def release(self, key: int) -> None:
        """Free the room of its targets. If scored again, it is judged on its first context, as at first."""
        entry = self.entries[key]
        self.arena.free(entry.targets.offset)
        entry.region = entry.context = None

    def forget(self, key: int) -> None:
        """Remove a sample, whatever its outcome."""
        if key in self.entries:
            if self.entries[key].region is not None:
                self.release(key)
            del self.entries[key]

    def ungraded(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.grade is None]

    # ---- on disk -------------------------------------------------------------------------------------------

    def snapshot(self, keys: Collection[int], scored: Iterable[int]) -> Snapshot:
        """These samples, and the targets of those that are `scored`, as they are now. Copies next to nothing:
        from now on, targets that are not written yet are copied before something else takes their place. The
        last snapshot must have been written.
        """
        entries = [self.entries[key] for key in sorted(keys)]
        blocks = {key: self._place(self.entries[key].targets) for key in sorted(scored)}
        self._held = Held(self.arena.memory.numpy(), blocks)
        rollouts = [e.rollout for e in entries]
        state = {
            "rollouts": rollout_fields(rollouts),
            "grades": {e.key: e.grade for e in entries if e.grade is not None},
        }
        return Snapshot(state, rollouts, self._held)

    def load(self, path: Path, state: Mapping[str, Any], teachers: Mapping[int, int]) -> None:
        """Take in what a snapshot wrote, and its state; `teachers` gives each key's teacher. Raises
        `UserError` if the targets do not fit.
        """
        rollouts, targets = load_buffer(path, state["rollouts"])
        for rollout in rollouts:
            self.add(rollout, teachers[rollout.key])
        for key, grade in state["grades"].items():
            self.entries[int(key)].grade = grade
        for key, raw in targets.items():
            if not self._allocate(self.entries[key]):
                raise UserError("teacher.buffer_gb: too small for the buffer in the checkpoint; raise it")
            offset, nbytes = self._place(self.entries[key].targets)
            self.arena.memory.numpy()[offset : offset + nbytes] = raw

    def _place(self, region: Region) -> tuple[int, int]:
        """Offset and bytes of the targets in this region."""
        return region.offset, self.specs[region.teacher].nbytes(region.positions)
