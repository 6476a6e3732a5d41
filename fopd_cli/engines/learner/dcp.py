"""torch.distributed.checkpoint, with or without a process group: any number of ranks reads what N ranks
wrote.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

# For the whole process: a filter that is set for one call is not safe beside other threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True)
class Snapshot:
    """A learner's state at one step. `extra` must go into the run's own state. With a `group`, each rank
    holds and writes its own part.
    """

    state: dict[str, Any]
    extra: dict[str, Any]
    group: dist.ProcessGroup | None

    def write(self, folder: Path) -> list[Path]:
        """Write it, synced to disk; a collective of the group. Returns the files that this rank wrote."""
        alone = self.group is None
        dcp.save(self.state, checkpoint_id=str(folder), process_group=self.group, no_dist=alone)
        rank = 0 if alone else dist.get_rank(self.group)
        return sorted([*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])])


def load(state: dict[str, Any], folder: Path, alone: bool) -> None:
    """Fill the state in place; a collective unless `alone`."""
    dcp.load(state, checkpoint_id=str(folder), no_dist=alone)
