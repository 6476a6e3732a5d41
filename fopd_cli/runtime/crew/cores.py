"""The machine's cores go to whoever computes at the moment.

Roles that run beside each other seldom compute at the same time: at depth 0 they take turns, and at any depth
a sampler waits for weights, a teacher for rollouts, a learner for a batch. With a fixed share each the cores
of those who wait would stand idle. So every worker says when it computes, and how many others do then is how
the cores are divided.
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
        """I compute from now on."""
        self._busy[self._row] = 1
        self.share()

    def rest(self) -> None:
        """I wait for something: my cores are free."""
        self._busy[self._row] = 0

    def share(self) -> None:
        """Take as many threads as fall to this worker now; cheap enough to be called between two layers."""
        threads = self.due()
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    def due(self) -> int:
        """Threads for this worker: an equal share, and the cores left over one each to the first in the
        table.
        """
        # A copy first: others write while we read, and an operator of torch's may look twice and stumble.
        working = [row for row, busy in enumerate(self._busy.tolist()) if busy]
        if self._row not in working:
            return self._total
        share, left = divmod(self._total, len(working))
        return max(1, share + (working.index(self._row) < left))
