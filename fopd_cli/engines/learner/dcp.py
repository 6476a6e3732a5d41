"""torch.distributed.checkpoint, with or without a process group: any number of ranks reads what N ranks
wrote.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp


def save(state: dict[str, Any], folder: Path, alone: bool) -> None:
    """Write the state; a collective unless `alone`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=str(folder), no_dist=alone)


def load(state: dict[str, Any], folder: Path, alone: bool) -> None:
    """Fill the state in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=str(folder), no_dist=alone)
