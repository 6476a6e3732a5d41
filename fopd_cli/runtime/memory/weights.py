"""Learner weights -> samplers: two slots in shared memory, each one whole version under Hugging Face names.

    learner: cast, write slot (t + 1) % 2  ->  conductor: Load  ->  sampler: read it, all or nothing

The memory belongs to the conductor, is inherited by the workers, and has no name in the file system. A
sampler that splits its model over processes of its own (vLLM, tensor parallel) hands them the slot by the
path of its file descriptor, so that the weights are never copied through a queue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    version that each rank of the learner stamps before and after its copy proves it, and a mismatch raises.
    """

    layout: Layout
    memory: Tensor
    stamps: Tensor  # int64 (2 slots, ranks, 2): version when writing began, version when it was complete

    @classmethod
    def create(cls, layout: Layout, ranks: int = 1) -> WeightChannel:
        """For a learner of so many ranks."""
        stamps = torch.full((2, ranks, 2), -1, dtype=torch.int64).share_memory_()
        channel = cls(layout, torch.empty(0), stamps)
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

    @contextmanager
    def writing(self, version: int, rank: int | None = None) -> Iterator[SharedWeights]:
        """The slot, for a rank to write its part of this version into, which is complete when it leaves
        without an error; None: all parts.
        """
        stamps = self.stamps[version % 2, slice(None) if rank is None else rank]
        stamps[..., 0] = version
        yield self._slot(version)
        stamps[..., 1] = version

    def write(self, version: int, weights: Iterator[tuple[str, Tensor]], rank: int | None = None) -> int:
        """Copy all weights into the version's slot, each cast to its dtype in the layout; returns bytes
        written. Copies from a device are queued, and awaited once at the end.

        Of several ranks that gather the weights together, and each stamp for themselves, the first writes.
        """
        with self.writing(version, rank) as slot:
            return self._write(version, weights, dict(slot), keep=not rank)

    def _write(
        self, version: int, weights: Iterator[tuple[str, Tensor]], views: dict[str, Tensor], keep: bool
    ) -> int:
        written, streams = 0, set()
        for name, tensor in weights:
            slot = views.pop(name)
            if keep:
                slot.copy_(tensor, non_blocking=True)
                written += slot.nbytes
                if tensor.is_cuda:
                    streams.add(torch.cuda.current_stream(tensor.device))
        for stream in streams:
            stream.synchronize()
        if views:
            raise RuntimeError(f"version {version} lacks the weights {sorted(views)[:3]}")
        return written

    def read(self, version: int) -> SharedWeights:
        """All weights of one version, in place; call `check` when done with them."""
        self.check(version)
        return self._slot(version)

    def check(self, version: int) -> None:
        """Raises if the slot does not hold all of this version (any more)."""
        found = self.stamps[version % 2].flatten().tolist()
        if set(found) != {version}:
            raise RuntimeError(
                f"weights of version {version} were overwritten while they were read (stamps {found})"
            )

    def save(self, version: int, path: Path) -> None:
        """Write one version's slot to a file, byte for byte."""
        self.check(version)
        start = (version % 2) * self.slot_bytes
        with path.open("wb") as file:
            file.write(self.memory[start : start + self.slot_bytes].numpy().data)

    def load(self, version: int, path: Path, dtypes: Sequence[torch.dtype]) -> None:
        """Load what `save` wrote; `dtypes` are those that the tensors had at the time."""
        saved = [(name, shape, dtype) for (name, shape, _), dtype in zip(self.layout, dtypes, strict=True)]
        memory = torch.from_file(str(path), shared=False, size=layout_bytes(saved), dtype=torch.uint8)
        self.write(version, iter(SharedWeights(memory, 0, saved)))

    def _slot(self, version: int) -> SharedWeights:
        return SharedWeights(self.memory, (version % 2) * self.slot_bytes, self.layout)
