"""TensorBoard's files.

Not by `SummaryWriter`: it writes in a thread, up to two minutes later, which a full disk ends with a
traceback, along with the records that it held.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram, scalar

from fopd_cli.files import Appender, Refused

_EDGES = 1e-12 * 1.1 ** np.arange(774)  # TensorBoard's own: up to 1e20, each a tenth above the last
BINS = np.concatenate([-_EDGES[::-1], [0.0], _EDGES])


class Board:
    """One file of a run's curves; each start of the run adds one. `refused`: see `Appender`."""

    def __init__(self, folder: Path, redone_from: int | None, refused: Refused | None = None) -> None:
        """What an earlier start wrote of the step `redone_from` and later ones is shown no more."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self.file = Appender(folder / name, refused=refused)
        self._records = RecordWriter(self.file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if redone_from is not None:
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=redone_from, session_log=start))

    def scalar(self, name: str, value: float, step: int) -> None:
        self._add(scalar(name, value), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._add(histogram(name, values, BINS), step)

    def _add(self, summary: Summary, step: int) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
