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
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def worker(run: Path, name: str, pid: int) -> psutil.Process:
    """A worker's process, of the run of that pid: the one that writes its log. One that is being started
    again has none for a while.
    """
    log = str(run / "logs" / f"{name}.log")

    def found() -> psutil.Process | None:
        return next((p for p in descendants(pid) if os.path.realpath(f"/proc/{p.pid}/fd/1") == log), None)

    return wait_for(found, f"a process of {name}")


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("step-??????"))
