"""Writes a learner's snapshots to the disk: at once, or in a thread beside the steps that follow.

The thread works on a copy in main memory and on a process group of its own. What it does in Python is little:
writing, syncing and hashing all release the interpreter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fopd_cli.engines.protocols import Snapshot
from fopd_cli.errors import disk_error
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.fleet import failure
from fopd_cli.runtime.journal.checkpoint import described


class Writer:
    """One rank's. `post` is given the result, `Failed` if it is not one of a disk that is full or refuses."""

    def __init__(self, post: Callable[[m.Saved | m.Failed], None]) -> None:
        self._post = post
        self._thread: threading.Thread | None = None

    def write(self, snapshot: Snapshot, command: m.SaveCommand) -> None:
        """Returns at once if the snapshot is staged, else when it is written. The last one must have been
        reported, since it may use the same memory.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not command.staged:
            self._write(snapshot, command)
            return
        self._thread = threading.Thread(
            target=self._write_or_fail, args=(snapshot, command), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write_or_fail(self, snapshot: Snapshot, command: m.SaveCommand) -> None:
        try:
            self._write(snapshot, command)
        except BaseException as error:
            self._post(failure(error))

    def _write(self, snapshot: Snapshot, command: m.SaveCommand) -> None:
        start, error, files = time.time(), None, {}
        try:
            files = {path.name: described(path) for path in snapshot.write(command.folder)}
        # torch wraps a full disk in a CheckpointException, which is not an Exception
        except BaseException as problem:
            error = disk_error(problem)
            if error is None:
                raise
        self._post(m.Saved(snapshot.extra, m.Span("save", start, time.time()), error, files))
