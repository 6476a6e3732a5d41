"""What the runtime asks of an engine. Each engine is a folder beside this file.

Every engine runs in its own worker process, driven by `runtime/crew/roles.py`. It is single-threaded and owns
its device memory; `sleep` gives that memory to the machine's other roles, and `wake` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from fopd_cli.losses.head import Head
from fopd_cli.samples import Request, Rollout, Sample, SampleStats, StepReport, TeacherTargets


@runtime_checkable
class Spread(Protocol):
    """Weights that every process of an engine gets by itself, not from the sampler's process. Picklable."""

    def within(self, rank: int, world: int, device: torch.device) -> Iterable[tuple[str, Tensor]]:
        """For one of `world` processes, which all call this, on its device."""


class Sampler(Protocol):
    """The student, generating. Requests may be added while others run; finished ones leave at once.

    `joins`: how often requests have joined running ones in a pass of their own.
    """

    joins: int

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue generations."""

    def step(self) -> list[Rollout]:
        """Advance every running request by about one token; return those that finished. Cheap when idle."""

    def abort(self) -> None:
        """Drop every queued and running request."""

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""

    def load(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Switch entirely to `version`. Running requests continue under it: their next tokens open a new
        span, and what those tokens attend to is recomputed with the new weights.
        """

    def sleep(self) -> None:
        """Give device memory back; nothing is running. Weights may be dropped: a `load` follows `wake`."""

    def wake(self) -> None: ...


class Teacher(Protocol):
    """A frozen teacher, judging. On several ranks all methods are called together, each rank with its own
    rollouts.
    """

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        """Fill the targets (views into shared memory) of each rollout, on its `judged` context."""

    def head(self) -> Head | None:
        """What turns its hidden states into logits; None if it does not give hidden states."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Snapshot(Protocol):
    """A learner's state at one step."""

    @property
    def extra(self) -> dict[str, Any]:
        """What must go into the run's own state (rank 0's is kept)."""

    def write(self, folder: Path) -> list[Path]:
        """Write it, synced to disk; on several ranks all write together. Returns this rank's files. Raises
        whatever torch makes of a full disk.
        """


class Piece(Protocol):
    """Some of one weight's elements, a run in flat order from `start` on; there may be none."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def read(self) -> Callable[[], Tensor]:
        """The elements, in the weight's own dtype; from any thread, until the weights change."""


class Publishing(Protocol):
    """What has a version of weights to publish."""

    version: int

    def publish(self, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full weights, one by one, in the dtypes named if these are narrower; every rank must exhaust the
        iterator.
        """

    def pieces(self) -> Sequence[Piece] | None:
        """This rank's part of what `publish` gives, as it is now; no other rank is asked. None if `publish`
        must be used, before the next step.
        """


class Learner(Publishing, Protocol):
    """The student, learning. On several ranks all methods are called together, in the same order."""

    def train(
        self, step: int, samples: Sequence[Sample], before_update: Callable[[], None] = lambda: None
    ) -> StepReport:
        """One optimizer step on the whole batch (every rank is given all of it and takes its share).
        `before_update` is called before any weight changes.
        """

    def evaluate(self, samples: Sequence[Sample], named: Container[int] = ()) -> SampleStats:
        """The same metrics without learning. Of the samples with the keys `named`, also what the teacher
        would rather have written.
        """

    def snapshot(self, staged: bool) -> Snapshot:
        """Its state as it is now, to be written: before anything else is asked of it, or if `staged` at any
        time before the next snapshot, from any thread.
        """

    def restore(self, folder: Path, extra: dict[str, Any]) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...
