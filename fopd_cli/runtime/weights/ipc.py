"""Weights by handle: where learner and sampler share a device, the learner's slots are memory of that device,
and the sampler copies from there to its model. Nothing passes through the host.

CUDA hands memory to another process by a handle, which each learner rank writes to a file at its start. Every
rank whose device has a sampler keeps all weights: a handle can be opened on its own device only. On a CPU the
same with shared memory of the learner's process, which is how it is tested.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.shared import shared_bytes
from fopd_cli.runtime.memory.weights import Layout, SharedWeights, WeightChannel
from fopd_cli.runtime.weights.transport import Inlet, Outlet

CPU = -1  # in the place of a device's number
SETTINGS = "PYTORCH_CUDA_ALLOC_CONF"


@dataclass
class Ipc:
    """Implements `transport.Transport`. `slots`: by device, as all processes number them, the layout and
    stamps of the slots there. `mirrored`: the conductor reads weights, too.
    """

    host: WeightChannel
    slots: dict[int, WeightChannel]
    rendezvous: Path
    mirrored: bool

    @classmethod
    def create(cls, layout: Layout, devices: Sequence[int], rendezvous: Path, mirrored: bool) -> Ipc:
        """`devices`: those with a sampler; none: the CPU."""
        slots = {device: WeightChannel.create(layout, memory=False) for device in devices or (CPU,)}
        return cls(WeightChannel.create(layout, memory=mirrored), slots, rendezvous, mirrored)

    def outlet(self, spec: WorkerSpec) -> Outlet:
        place = spec.devices[0] if spec.devices else CPU
        if place not in self.slots or not (spec.devices or spec.rank == 0):
            return Outlet(self.host, keep=False)
        slots = self.slots[place]
        memory = _shareable(2 * slots.slot_bytes, bool(spec.devices))
        _file(self.rendezvous, place).write_bytes(_handle(memory))
        # The first of the ranks that keep anything writes for the conductor, too.
        mirror = self.host if self.mirrored and place == min(self.slots) else None
        return Outlet(replace(slots, memory=memory), True, mirror, pieces=spec.world == 1)

    def inlet(self, spec: WorkerSpec, copies: bool) -> Inlet:
        places = spec.devices or (CPU,)
        return IpcInlet({place: self.slots[place] for place in places}, self.rendezvous)


@dataclass
class IpcInlet:
    """Implements `transport.Inlet`, for the devices of one replica, in their order."""

    slots: dict[int, WeightChannel]
    rendezvous: Path

    @property
    def slot_bytes(self) -> int:
        return next(iter(self.slots.values())).slot_bytes

    def read(self, version: int) -> Opened:
        self.check(version)
        return Opened(version, self.slots, self.rendezvous)

    def check(self, version: int) -> None:
        for slots in self.slots.values():
            slots.check(version)


@dataclass(frozen=True)
class Opened:
    """One version, in the learner's memory on the device of whoever iterates."""

    version: int
    slots: dict[int, WeightChannel]
    rendezvous: Path

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self.within(0, 1, torch.device("cpu" if CPU in self.slots else "cuda:0"))

    def within(self, rank: int, world: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """For the process of an engine that uses `device`, the replica's `rank`th."""
        place, slots = list(self.slots.items())[rank if len(self.slots) > 1 else 0]
        memory = _opened(_file(self.rendezvous, place), device)
        return iter(replace(slots, memory=memory).slot_of(self.version))


# ---- handles -----------------------------------------------------------------------------------------------

_known: dict[Path, Tensor] = {}  # opened in this process, for good


def _opened(file: Path, device: torch.device) -> Tensor:
    if file not in _known:
        found = pickle.loads(file.read_bytes())
        if device.type == "cuda":
            rebuild, args = found
            # The device's number in this process: each sees its own devices only.
            _known[file] = rebuild(*args[:6], device.index or 0, *args[7:])
        else:
            _known[file] = found.memory
    return _known[file]


def _handle(memory: Tensor) -> bytes:
    if memory.is_cuda:
        from torch.multiprocessing.reductions import reduce_tensor

        return pickle.dumps(reduce_tensor(memory))
    return pickle.dumps(SharedWeights(memory, 0, []))


def _shareable(nbytes: int, cuda: bool) -> Tensor:
    if not cuda:
        return shared_bytes(nbytes)
    with _plain_segments():
        return torch.zeros(nbytes, dtype=torch.uint8, device="cuda")


@contextlib.contextmanager
def _plain_segments() -> Iterator[None]:
    """Handles of PyTorch's expandable segments, which a learner uses, go through `pidfd_getfd`, which most
    containers forbid. torch takes no block of such a segment while they are off.
    """
    memory: Any = torch.cuda.memory
    # the second is the deprecated name, which an older torch may have only
    setting = getattr(torch._C, "_accelerator_setAllocatorSettings", memory._set_allocator_settings)
    off = "expandable_segments:False"
    setting(off)
    try:
        yield
    finally:
        setting(os.environ.get(SETTINGS, off))


def _file(rendezvous: Path, place: int) -> Path:
    return rendezvous.with_name(f"{rendezvous.name}-slots-{place}")
