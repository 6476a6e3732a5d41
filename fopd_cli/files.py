"""Files that are whole at any moment, also on a disk that is full. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path

Refused = Callable[[Path, OSError], None]


def write_synced(path: Path, text: str) -> None:
    """Replace a small file, completely or not at all; returns when it is on the disk. Raises `OSError`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written to a file, or which files a folder has, is on the disk. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Appender:
    """Writes whole pieces, each at once. What the disk does not take waits in memory until it does:
    nothing is lost, and no reader finds half a piece.
    """

    def __init__(self, path: Path, tail: bytes = b"", refused: Refused | None = None) -> None:
        """The file is made if there is none. `tail` is how it ends at any moment, now included: a piece is
        written over it, with the tail behind. `refused` is told why a piece has to wait; without it, `write`
        raises `OSError`. Raises `OSError`.
        """
        self.path, self._tail, self._refused = path, tail, refused
        self._waiting: deque[bytes] = deque()
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._at = path.stat().st_size - len(tail)

    @property
    def waiting(self) -> int:
        """Pieces that wait."""
        return len(self._waiting)

    def write(self, piece: bytes) -> None:
        self._waiting.append(piece)
        try:
            self.flush()
        except OSError as error:
            if self._refused is None:
                raise
            self._refused(self.path, error)

    def flush(self) -> None:
        """Write all that waits. Raises `OSError`."""
        while self._waiting:
            piece = self._waiting[0]
            try:
                self._put(self._at, piece + self._tail)
            except OSError:
                self._take_back()
                raise
            self._at += len(piece)
            self._waiting.popleft()

    def _put(self, at: int, data: bytes) -> None:
        self._file.seek(at)
        while data:
            data = data[self._file.write(data) :]  # a disk that is nearly full takes a part

    def _take_back(self) -> None:
        """As it was before a piece of which only a part was taken; there was room for that."""
        with contextlib.suppress(OSError):
            self._file.truncate(self._at)
            self._put(self._at, self._tail)

    def close(self) -> None:
        """Does not write what waits."""
        self._file.close()
