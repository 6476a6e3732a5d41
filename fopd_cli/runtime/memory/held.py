"""Blocks of shared memory as they are at one moment, for a thread that writes them to the disk while the run
goes on in the same memory.

Nothing is copied at first. Who is about to write over a block says so; if it is not on the disk yet, it is
copied aside before. So the allocator gives out memory as if nothing were being saved.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np

CHUNK = 4 << 20  # bytes that are read at once; whoever writes over a block waits for no more
ASIDE = 1 << 30  # bytes that are copied aside at most; from there on, it waits for the disk


class Held:
    """`memory` is uint8, shared; `blocks` has the offset and the size of each block, in bytes, by its key."""

    def __init__(self, memory: np.ndarray, blocks: Mapping[int, tuple[int, int]], aside: int = ASIDE) -> None:
        self._memory, self._limit = memory, aside
        self._blocks = dict(blocks)  # not read yet
        self._copies: dict[int, np.ndarray] = {}
        self._changed = threading.Condition()

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each block that is not read yet, in the order in which they were given."""
        return {key: nbytes for key, (_, nbytes) in self._blocks.items()}

    # ---- the thread that writes ----------------------------------------------------------------------------

    def read(self, key: int) -> Iterator[np.ndarray]:
        """A block's bytes as they were, piece by piece, each valid until the next. After the last one the
        block is let go.
        """
        offset, nbytes = self._blocks[key]
        piece = np.empty(min(CHUNK, nbytes), np.uint8)
        for begin in range(0, nbytes, CHUNK):
            part = piece[: min(CHUNK, nbytes - begin)]
            with self._changed:
                copied = self._copies.get(key)
                source = self._memory[offset : offset + nbytes] if copied is None else copied
                np.copyto(part, source[begin : begin + len(part)])
            yield part
        with self._changed:
            del self._blocks[key]
            self._copies.pop(key, None)
            self._changed.notify_all()

    def let_go(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._blocks.clear()
            self._copies.clear()
            self._changed.notify_all()

    # ---- the run -------------------------------------------------------------------------------------------

    def let_write(self, offset: int, nbytes: int) -> None:
        """Call before these bytes change."""
        with self._changed:
            for key in [key for key in self._blocks if self._overlaps(key, offset, nbytes)]:
                self._keep(key)

    def _overlaps(self, key: int, offset: int, nbytes: int) -> bool:
        start, size = self._blocks[key]
        return start < offset + nbytes and offset < start + size

    def _keep(self, key: int) -> None:
        self._changed.wait_for(lambda: key not in self._blocks or self._has_room_for(key))
        if key in self._blocks and key not in self._copies:
            offset, nbytes = self._blocks[key]
            self._copies[key] = self._memory[offset : offset + nbytes].copy()

    def _has_room_for(self, key: int) -> bool:
        aside = sum(copy.nbytes for copy in self._copies.values())
        return key in self._copies or aside + self._blocks[key][1] <= self._limit
