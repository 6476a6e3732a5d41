"""Learner weights -> samplers: two slots in shared memory, each one whole version under Hugging Face names.

    learner: gather, cast, write slot (t + 1) % 2  ->  conductor: Load  ->  sampler: read it, all or nothing

The memory belongs to the conductor, is inherited by the workers, and has no name in the file system. A
sampler that splits its model over processes of its own (vLLM, tensor parallel) hands them the slot by the
path of its file descriptor, so that the weights are never copied through a queue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.runtime.memory.arena import ALIGNMENT, aligned, view
from fopd_cli.runtime.memory.shared import cuda_runtime, page_lock, shared_bytes

Layout = list[tuple[str, tuple[int, ...], torch.dtype]]  # name, shape and dtype of each tensor


class SharedWeights:
    """One version's weights, in place: iterate for `(name, view)`. Pickles as a path into this process."""

    def __init__(self, memory: Tensor, offset: int, layout: Layout) -> None:
        self.memory, self.offset, self.layout = memory, offset, layout

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        offset = self.offset
        for name, shape, dtype in self.layout:
            yield name, view(self.memory, offset, dtype, shape)
            offset += aligned(dtype.itemsize * int(np.prod(shape)))

    def __reduce__(self) -> tuple[Any, ...]:
        fd, size = self.memory.untyped_storage()._share_fd_cpu_()
        return _open, (f"/proc/{os.getpid()}/fd/{fd}", size, self.offset, self.layout)


def _open(path: str, size: int, offset: int, layout: Layout) -> SharedWeights:
    return SharedWeights(torch.from_file(path, shared=True, size=size, dtype=torch.uint8), offset, layout)


def layout_bytes(layout: Layout) -> int:
    """Bytes of one version."""
    return sum(aligned(dtype.itemsize * int(np.prod(shape))) for _, shape, dtype in layout)


@dataclass
class WeightChannel:
    """The two slots. The schedule never lets a slot be overwritten while a sampler may still read it; the
    version that whoever writes stamps before and after the copy proves it, and a mismatch raises.
    """

    layout: Layout
    memory: Tensor  # uint8 (2 * slot_bytes): of the host, or a device's
    # int64 (2 slots, ranks that write, 2): version when writing began, version when it was complete
    stamps: Tensor

    @classmethod
    def create(cls, layout: Layout, memory: bool = True, ranks: int = 1) -> WeightChannel:
        """`memory=False`: layout and stamps alone; the slots are elsewhere, or not used. `ranks`: how many
        may each write a part of a version.
        """
        stamps = torch.full((2, ranks, 2), -1, dtype=torch.int64).share_memory_()
        channel = cls(layout, torch.empty(0, dtype=torch.uint8), stamps)
        if memory:
            channel.memory = shared_bytes(max(2 * channel.slot_bytes, ALIGNMENT))
        return channel

    @property
    def slot_bytes(self) -> int:
        """Bytes of one version."""
        return layout_bytes(self.layout)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of each tensor in a slot."""
        return {name: dtype for name, _, dtype in self.layout}

    def page_lock(self) -> None:
        """For a process with a CUDA device: copies between it and the slots then run at bus speed, without a
        detour through a driver buffer. If the kernel refuses to lock that much, they are slower, and the
        worker's log says so.
        """
        if error := page_lock(self.memory, cuda_runtime()):
            print(
                f"the weight slots ({self.memory.nbytes / 1e9:.1f} GB) could not be page-locked (CUDA error "
                f"{error}); updates of weights will be slower; raise the limit on locked memory (ulimit -l)",
                file=sys.stderr,
            )

    def write(self, version: int, weights: Iterator[tuple[str, Tensor]], keep: bool = True) -> int:
        """Copy all weights into the version's slot, each cast to its dtype in the layout; returns bytes
        written. Copies from a device are queued, and awaited once at the end.

        Ranks that only take part in gathering the weights pass `keep=False`.
        """
        with self.writing(version) if keep else nullcontext(()) as slot:
            return self._written(version, weights, dict(slot), keep)

    @contextmanager
    def writing(self, version: int, rank: int | None = None) -> Iterator[SharedWeights]:
        """The slot, for whoever writes all of this version into it, or as one of several ranks a part. That
        is complete when it leaves without an error.
        """
        stamps = self.stamps[version % 2, slice(None) if rank is None else rank]
        stamps[..., 0] = version
        yield self.slot_of(version)
        stamps[..., 1] = version

    def _written(
        self, version: int, weights: Iterator[tuple[str, Tensor]], views: dict[str, Tensor], keep: bool
    ) -> int:
        missing, written = set(self.dtypes), 0
        streams = set()
        for name, tensor in weights:
            missing.remove(name)
            if keep:
                slot = views[name]
                slot.copy_(tensor, non_blocking=True)
                written += slot.nbytes
                streams |= {torch.cuda.current_stream(t.device) for t in (tensor, slot) if t.is_cuda}
        for stream in streams:
            stream.synchronize()
        if missing:
            raise RuntimeError(f"version {version} lacks the weights {sorted(missing)[:3]}")
        return written

    def read(self, version: int) -> SharedWeights:
        """All weights of one version, in place; call `check` when done with them."""
        self.check(version)
        return self.slot_of(version)

    def check(self, version: int) -> None:
        """Raises if the slot does not hold all of this version (any more)."""
        found = self.stamps[version % 2].flatten().tolist()
        if set(found) != {version}:
            raise RuntimeError(
                f"weights of version {version} were overwritten while they were read (stamps {found})"
            )

    @property
    def held(self) -> list[int]:
        """The versions that are here as a whole."""
        stamps = [set(slot) for slot in self.stamps.flatten(1).tolist()]
        return [version for slot in stamps if len(slot) == 1 for version in slot if version >= 0]

    def slot(self, version: int) -> Tensor:
        """uint8 `(slot_bytes,)`: the slot that a version has, whatever is in it."""
        start = (version % 2) * self.slot_bytes
        return self.memory[start : start + self.slot_bytes]

    def save(self, version: int, path: Path) -> None:
        """Write one version's slot to a file, byte for byte. Raises if it is overwritten meanwhile."""
        self.check(version)
        with path.open("wb") as file:
            file.write(self.slot(version).numpy().data)
        self.check(version)

    def load(self, version: int, path: Path, dtypes: Sequence[torch.dtype]) -> None:
        """Load what `save` wrote; `dtypes` are those that the tensors had at the time."""
        saved = [(name, shape, dtype) for (name, shape, _), dtype in zip(self.layout, dtypes, strict=True)]
        memory = torch.from_file(str(path), shared=False, size=layout_bytes(saved), dtype=torch.uint8)
        self.write(version, iter(SharedWeights(memory, 0, saved)))

    def slot_of(self, version: int) -> SharedWeights:
        """The weights in the slot that a version has, whatever it holds."""
        return SharedWeights(self.memory, (version % 2) * self.slot_bytes, self.layout)
