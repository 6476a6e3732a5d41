"""Reads a run directory in any state: running, stopped, killed, finished."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from fopd_cli import paths
from fopd_cli.errors import UserError
from fopd_cli.recipe.renames import rename

Record = dict[str, Any]
State = Literal["running", "finished", "stopped"]


@dataclass
class Run:
    """What a run has written. Records are in step order; `pid` is the process that holds the lock."""

    path: Path
    recipe: Record
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    refreshes: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    warnings: list[Record] = field(default_factory=list)
    summary: Record | None = None
    pid: int | None = None

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def planned(self) -> int:
        return int(self.recipe.get("learner", {}).get("steps", 0))

    @property
    def state(self) -> State:
        if self.pid is not None:
            return "running"
        # A run that was extended and then stopped still has the summary of its first end.
        done = self.summary is not None and self.step <= self.summary.get("steps", -1)
        complete = done and (
            self.step >= self.planned or (self.summary or {}).get("stopped_early") is not None
        )
        return "finished" if complete else "stopped"

    @property
    def seconds(self) -> float:
        """Wall time in seconds, as far as the records go."""
        records = [*self.steps[-1:], *self.evaluations[-1:]]
        found = [float(r.get("timing", {}).get("wall_seconds") or 0) for r in records]
        return max(
            [
                *found,
                float((self.summary or {}).get("wall_seconds") or 0) if self.state == "finished" else 0.0,
            ]
        )

    @property
    def sets(self) -> list[str]:
        """Names of the held-out sets; empty if there is only one."""
        return list(self.evaluations[-1].get("sets", {})) if self.evaluations else []

    def of_set(self, name: str) -> Run:
        """The run with the evaluations of one held-out set; there may be none."""
        found = [{**e, **e["sets"][name]} for e in self.evaluations if name in e.get("sets", {})]
        return replace(self, evaluations=found)

    def last(self, key: str) -> tuple[float | None, float | None]:
        """The newest evaluation's figure and its standard error; None where missing."""
        for record in reversed(self.evaluations):
            if record.get(key) is not None:
                return float(record[key]), record.get(f"{key}_error")
        return None, None


def sets_of(runs: Iterable[Run]) -> list[str]:
    """Names of all held-out sets of the runs, in order."""
    return list(dict.fromkeys(name for run in runs for name in run.sets))


def is_run(path: Path) -> bool:
    return paths.is_file(path / "recipe.yaml")


def read(path: Path) -> Run:
    """Raises `UserError` if `path` is not a run directory."""
    if not is_run(path):
        raise UserError(f"{path}: is not a run directory (it has no recipe.yaml){paths.similar(path)}")
    try:
        recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / 'recipe.yaml'}: cannot be read: {error}") from None
    recipe = recipe if isinstance(recipe, dict) else {}
    rename(recipe, str(path / "recipe.yaml"))  # an older run's
    run = Run(path, recipe, pid=holder(path / "run.lock"))
    kinds = {"step": run.steps, "eval": run.evaluations, "refresh": run.refreshes}
    for record in jsonl(path / "metrics.jsonl"):
        kinds.get(str(record.get("kind")), []).append(record)
    run.samples = jsonl(path / "samples.jsonl")
    run.warnings = jsonl(path / "warnings.jsonl")
    with contextlib.suppress(OSError, ValueError):
        run.summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return run


def jsonl(path: Path) -> list[Record]:
    """The records of a file that may still be growing; an incomplete last line is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
    return found


def holder(lock: Path) -> int | None:
    """The live process that holds a run's lock, from the kernel's list. Trying the lock, even briefly, could
    make a run fail that is just starting.
    """
    try:
        inode, pid = lock.stat().st_ino, int(lock.read_text().strip() or 0)
        held = Path("/proc/locks").read_text()
    except (OSError, ValueError):
        return None
    for line in held.splitlines():
        fields = line.split()
        if "FLOCK" in fields and "->" not in fields and any(f.endswith(f":{inode}") for f in fields):
            return pid
    return None
