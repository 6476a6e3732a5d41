"""A transport carries versions of the weights from the learner to the samplers. It has two ends, and neither
the learner's nor a sampler's role knows which transport it is:

    learner: outlet.write(version, ...)  ->  conductor: LoadCommand(version)  ->  sampler: inlet.read(version)

All transports keep the schedule's rule. The learner has two slots; version t + 1 is written over version
t - 1. A sampler takes a version from its slot when it is told to, at its own time, so the learner waits for
no sampler, and one sampler for no other. The stamps of a slot are in shared memory, whatever the transport:
whoever reads gets all of a version or raises.

| transport | where the slots are | how a sampler reads |
|---|---|---|
| shared | shared memory of the host | in place |
| broadcast | memory of learner rank 0, on its device | a process group with it: NCCL, on a CPU gloo |
| ipc | memory of the learner on the sampler's own device | in place, by a handle of CUDA |

Into the host's slots, every rank of the learner writes its own shards, beside its next step. Elsewhere one
rank keeps all of a version: if there are others, it is gathered before the next step.

The conductor reads weights itself where it keeps the best student, or saves the version before (fixed lag).
Then the learner writes them to the host's slots, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.weights import SharedWeights, WeightChannel

Named = Iterable[tuple[str, Tensor]]


class Inlet(Protocol):
    """A sampler's end."""

    @property
    def slot_bytes(self) -> int:
        """Bytes of one version."""
        ...

    def read(self, version: int) -> Named:
        """All weights of one version, to be iterated once, each tensor valid until the next `read`; call
        `check` when done with them. Raises if the version is not there, or its learner is gone.
        """
        ...

    def check(self, version: int) -> None:
        """Raises if the version is not there as a whole (any more)."""


@dataclass
class Outlet:
    """The learner's end, the same for every transport. `keep`: whether this rank keeps what it gathers.
    `mirror`: the host's slots, if it is to write them, too. `pieces`: whether it may instead write what it
    holds itself; `rank`: as one of several that do.
    """

    slots: WeightChannel
    keep: bool
    mirror: WeightChannel | None = None
    pieces: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        """A resumed run under a fixed lag begins with a version that the conductor has put into the host's
        slots.
        """
        if self.mirror is not None and self.keep:
            for version in self.mirror.held:
                self.slots.write(version, iter(self.mirror.read(version)))

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor, as samplers get it."""
        return self.slots.dtypes

    @contextmanager
    def writing(self, version: int) -> Iterator[SharedWeights]:
        """The slot, for this rank's pieces of a version."""
        with self.slots.writing(version, self.rank) as slot:
            yield slot
        self._mirror(version)

    def write(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> int:
        """Take in all weights; returns bytes written. All ranks call this: gathering is a collective."""
        written = self.slots.write(version, weights, self.keep)
        self._mirror(version)
        return written

    def _mirror(self, version: int) -> None:
        if self.mirror is not None and self.keep:
            self.mirror.write(version, iter(self.slots.read(version)))


class Transport(Protocol):
    """Made by the conductor, and sent to every worker at its start."""

    host: WeightChannel  # the conductor's end: the host's slots, without memory if nothing is written there

    def outlet(self, spec: WorkerSpec) -> Outlet:
        """For the process of a learner rank; once."""
        ...

    def inlet(self, spec: WorkerSpec, copies: bool) -> Inlet:
        """For the process of a sampler; once. `copies`: it copies from there to its device itself, and not
        processes of the engine's own.
        """
        ...


@dataclass
class Shared:
    """The host's slots, in place."""

    host: WeightChannel

    def outlet(self, spec: WorkerSpec) -> Outlet:
        if spec.devices:
            self.host.page_lock()
        rank = spec.rank if spec.world > 1 else None
        return Outlet(self.host, keep=spec.rank == 0, pieces=True, rank=rank)

    def inlet(self, spec: WorkerSpec, copies: bool) -> Inlet:
        if spec.devices and copies:
            self.host.page_lock()
        return self.host
