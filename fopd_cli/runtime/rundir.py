"""The run directory: made once, locked while in use, never overwritten.

runs/NAME/  recipe.yaml (resolved)  recipe-history.jsonl (what was changed at which step)  metrics.jsonl  ledger.jsonl  samples.jsonl  warnings.jsonl  trace.json  tensorboard/
            checkpoints/step-000100/  student/ (Hugging Face format)  summary.json  logs/WORKER.log
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from fopd_cli import paths
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, dump_recipe, load_recipe
from fopd_cli.runtime.checkpoint import write_synced


class RunDir:
    """Paths of a run, and the lock that keeps two processes out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.student = path / "student"
        self.recipe = path / "recipe.yaml"
        self.history = path / "recipe-history.jsonl"
        self.summary = path / "summary.json"
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDir:
        """Refuses a directory that holds anything."""
        run = cls(path)
        if paths.exists(path) and (not path.is_dir() or any(path.iterdir())):
            hint = f"go on with it (fopd resume {path}) or " if run.recipe.is_file() else ""
            raise UserError(f"--run-dir: {path} exists and is not empty; {hint}give another --run-dir")
        try:
            run.logs.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--run-dir: cannot make {path}: {error.strerror}") from None
        run.lock()
        write_synced(run.recipe, dump_recipe(recipe))
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run."""
        run = cls(path)
        if not paths.is_file(run.recipe):
            raise UserError(f"{path}: is no run directory (it has no recipe.yaml)")
        return run

    def load_recipe(self, overrides: list[str]) -> Recipe:
        return load_recipe(self.recipe, overrides)

    def changed(self) -> list[tuple[int, dict[str, list[Any]]]]:
        """The history: (step, key -> [value before, value since]), oldest first."""
        found = []
        for line in self.history.read_text(encoding="utf-8").splitlines() if self.history.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                record = json.loads(line)
                found.append((int(record["step"]), dict(record["changed"])))
        return found

    def lock(self) -> None:
        """Hold the directory for this process; the kernel lets go when it dies, however it dies."""
        file = (self.path / "run.lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{self.path}: is in use by the live process {file.read().strip() or '?'}; wait for it or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file
