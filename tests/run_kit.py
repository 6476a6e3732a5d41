"""Runs under way: started in the background, their workers, their checkpoints, and whether all is gone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
from conftest import Fopd, descendants, wait_for


def start(fopd: Fopd, recipe: dict[str, Any], name: str = "run") -> tuple[subprocess.Popen[str], Path]:
    run = fopd.folder / name
    return fopd.start("run", fopd.recipe(recipe, f"{name}.yaml"), "--run-dir", run), run


def gone(processes: list[psutil.Process]) -> bool:
    return not any(map(_living, processes))


def _living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def worker(run: Path, name: str, pid: int, before: psutil.Process | None = None) -> psutil.Process:
    """A worker's process, of the run of that pid: the one that writes its log. One that is being started
    again has none for a while.

    `before`: the one that was killed there, which may still be ending.
    """
    log = str(run / "logs" / f"{name}.log")

    def found() -> psutil.Process | None:
        return next((p for p in descendants(pid) if p != before and _writes(p, log)), None)

    return wait_for(found, f"a process of {name}")


def _writes(process: psutil.Process, log: str) -> bool:
    return os.path.realpath(f"/proc/{process.pid}/fd/1") == log


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-??????"))
