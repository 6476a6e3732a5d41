"""What code in a sandbox may use, and how its run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limits:
    """Limits of one sandbox. Times are per command, the rest for all its processes together unless said
    otherwise.
    """

    wall_s: float = 15.0
    cpu_s: int = 10  # of each process
    memory_mb: int = 512  # resident; also the most that each process can request
    processes: int = 32
    output_kb: int = 64
    disk_mb: int = 64  # /tmp, and /dev/shm, each; and the largest file anywhere
    workspace_mb: int = 1024  # all files of a workspace on disk


@dataclass(frozen=True)
class Outcome:
    """What a command printed (stdout and stderr as they came) and why it ended.

    `exit`: by itself, with `code` (for a Python session 0, or 1 after an exception); all others: it was
    stopped, together with everything that it had started.
    """

    output: str
    reason: Literal["exit", "timeout", "memory", "disk", "output", "died"]
    code: int | None
    seconds: float
