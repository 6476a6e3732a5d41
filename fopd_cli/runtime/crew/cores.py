"""The machine's cores go to the workers that are computing right now.

Roles that run side by side seldom compute at the same time: at max_lag 0 they take turns, and at any lag a
sampler waits for weights, a teacher for rollouts, a learner for a batch. With fixed shares, the cores of
waiting workers would sit idle. So every worker says when it computes, and the cores are divided among those
that do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

MOST_WORKERS = 256


def here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def table() -> Tensor:
    """Shared memory with a row for each worker: 1 while it computes."""
    return torch.zeros(MOST_WORKERS, dtype=torch.int32).share_memory_()


class Cores:
    """One worker's view of the table. `total` cores are divided; a worker always keeps at least one
    thread.
    """

    def __init__(self, busy: Tensor, row: int, total: int) -> None:
        self._busy, self._row, self._total = busy, row, total
        self._threads = 0

    def compute(self) -> None:
        """This worker computes from now on."""
        self._busy[self._row] = 1
        self.share()

    def rest(self) -> None:
        """This worker waits for something: its cores are free."""
        self._busy[self._row] = 0

    def share(self) -> None:
        """Take this worker's current share of threads; cheap enough to call between two layers."""
        threads = self.due()
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def due(self) -> int:
        """Threads for this worker: an equal share; leftover cores go one each to the first in the table."""
        # Copy first: others write while we read, and torch operators that read twice may trip over a change.
        working = [row for row, busy in enumerate(self._busy.tolist()) if busy]
        if self._row not in working:
            return self._total
        share, left = divmod(self._total, len(working))
        return max(1, share + (working.index(self._row) < left))
