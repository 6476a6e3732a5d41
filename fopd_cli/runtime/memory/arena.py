"""The arena of teacher targets: shared memory that does not outlive its processes.

The conductor makes it before it spawns the workers, which inherit it. The memory has no name in the file
system, so nothing can leak, whatever kills the command. Queues carry only offsets.
"""

from __future__ import annotations

import bisect
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fopd_cli.runtime.memory.shared import shared_bytes
from fopd_cli.samples import TargetSpec, TeacherTargets

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def view(memory: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A typed view of raw memory."""
    nbytes = dtype.itemsize * int(np.prod(shape))
    return memory[offset : offset + nbytes].view(dtype).view(shape)


class Arena:
    """First-fit allocator over one shared buffer. Only the conductor allocates; a full arena holds the
    teacher back.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free = [(0, nbytes)]  # (offset, size), sorted, never adjacent
        self._used: dict[int, int] = {}

    @cached_property
    def memory(self) -> Tensor:
        """uint8 (nbytes,), made when it is first asked for: a run that is only planned needs none. Raises
        `UserError` if /dev/shm cannot hold it.
        """
        return shared_bytes(max(self.nbytes, ALIGNMENT))

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def allocate(self, nbytes: int) -> int | None:
        """Offset of `nbytes` bytes, or None while there is no room."""
        size = max(ALIGNMENT, aligned(nbytes))
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


def targets_at(
    memory: Tensor, offset: int, spec: TargetSpec, positions: int, teacher: int = 0
) -> TeacherTargets:
    """One sample's targets as views into the arena's memory (any process)."""
    views = {}
    for name, dtype, shape in spec.fields(positions):
        views[name] = view(memory, offset, dtype, shape)
        offset += views[name].nbytes
    return TeacherTargets(spec.kind, **views, teacher=teacher)
