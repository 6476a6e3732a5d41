"""Shared memory that outlives no process: the teacher targets' arena, and the weights' double buffer.

Both are made by the conductor before it spawns the workers and are inherited by them. The memory has no name in the
file system (torch unlinks it at once), so nothing can leak, whatever kills the command. Queues carry only offsets.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fopd_cli.samples import TargetSpec, TeacherTargets

ALIGNMENT = 64


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def shared_bytes(nbytes: int) -> Tensor:
    """Shared uint8 memory, zeroed lazily by the kernel; pages that are never written cost nothing."""
    return torch.empty(max(nbytes, ALIGNMENT), dtype=torch.uint8).share_memory_()


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    nbytes = dtype.itemsize * int(np.prod(shape))
    return memory[offset : offset + nbytes].view(dtype).view(shape)


class Arena:
    """First-fit allocator over one shared buffer. Only the conductor allocates; a full arena holds the teacher back."""

    def __init__(self, nbytes: int) -> None:
        self.memory = shared_bytes(nbytes)
        self.nbytes = nbytes
        self._free = [(0, nbytes)]  # (offset, size), sorted, never adjacent
        self._used: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def allocate(self, nbytes: int) -> int | None:
        """Offset of `nbytes` bytes, or None while there is no room."""
        size = max(ALIGNMENT, _aligned(nbytes))
        for i, (offset, free) in enumerate(self._free):
            if free >= size:
                self._used[offset] = size
                if free == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, free - size)
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give a block back, merging it with free neighbours."""
        size = self._used.pop(offset)
        i = bisect.bisect(self._free, (offset, 0))
        if i < len(self._free) and self._free[i][0] == offset + size:
            size += self._free.pop(i)[1]
        if i and sum(self._free[i - 1]) == offset:
            offset, size = self._free[i - 1][0], self._free[i - 1][1] + size
            del self._free[i - 1]
            i -= 1
        self._free.insert(i, (offset, size))


def targets_at(memory: Tensor, offset: int, spec: TargetSpec, positions: int) -> TeacherTargets:
    """One sample's targets as views into the arena's memory (any process)."""
    views = {}
    for name, dtype, shape in spec.fields(positions):
        views[name] = _view(memory, offset, dtype, shape)
        offset += views[name].nbytes
    return TeacherTargets(spec.kind, **views)


@dataclass
class WeightChannel:
    """Learner -> samplers: two slots, each one whole version. The schedule never lets a slot be overwritten while a
    sampler may still read it; the version stamped before and after the copy proves it, and a mismatch raises."""

    layout: list[tuple[str, tuple[int, ...]]]
    dtype: torch.dtype
    memory: Tensor
    stamps: Tensor  # int64 (2 slots, 2): version when writing began, version when it was complete

    @classmethod
    def create(cls, layout: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> WeightChannel:
        channel = cls(layout, dtype, torch.empty(0), torch.full((2, 2), -1, dtype=torch.int64).share_memory_())
        channel.memory = shared_bytes(2 * channel.slot_bytes)
        return channel

    @property
    def slot_bytes(self) -> int:
        return sum(_aligned(self.dtype.itemsize * int(np.prod(shape))) for _, shape in self.layout)

    def write(self, version: int, weights: Iterator[tuple[str, Tensor]], keep: bool = True) -> int:
        """Copy all weights into the version's slot, cast to the channel's dtype; returns bytes written.

        Ranks that only take part in gathering the weights pass `keep=False`.
        """
        stamps, views, written = self.stamps[version % 2], dict(self._views(version)), 0
        if keep:
            stamps[0] = version
        for name, tensor in weights:
            view = views.pop(name)
            if keep:
                view.copy_(tensor)
                written += view.nbytes
        if views:
            raise RuntimeError(f"version {version} lacks the weights {sorted(views)[:3]}")
        if keep:
            stamps[1] = version
        return written

    def read(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """All weights of one version, as views."""
        self._check(version)
        yield from self._views(version)
        self._check(version)

    def _check(self, version: int) -> None:
        found = self.stamps[version % 2].tolist()
        if found != [version, version]:
            raise RuntimeError(f"weights of version {version} were overwritten while they were read (stamps {found})")

    def _views(self, version: int) -> Iterator[tuple[str, Tensor]]:
        offset = (version % 2) * self.slot_bytes
        for name, shape in self.layout:
            yield name, _view(self.memory, offset, self.dtype, shape)
            offset += _aligned(self.dtype.itemsize * int(np.prod(shape)))
