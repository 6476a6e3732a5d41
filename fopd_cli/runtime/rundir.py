"""The run directory: made once, locked while in use, never overwritten.

runs/NAME/  recipe.yaml (resolved)  metrics.jsonl  ledger.jsonl  samples.jsonl  trace.json  tensorboard/
            checkpoints/step-000100/  student/ (Hugging Face format)  summary.json  logs/WORKER.log
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, dump_recipe, load_recipe
from fopd_cli.runtime.checkpoint import write_synced

# What a checkpoint depends on: with another value of these, its weights or its samples would mean something else.
IDENTITY = ("student", "teacher", "task", "seed")


class RunDir:
    """Paths of a run, and the lock that keeps two processes out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.student = path / "student"
        self.recipe = path / "recipe.yaml"
        self.summary = path / "summary.json"
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDir:
        """Refuses a directory that holds anything."""
        run = cls(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
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
        if not run.recipe.is_file():
            raise UserError(f"{path}: is no run directory (it has no recipe.yaml)")
        return run

    def load_recipe(self, overrides: list[str]) -> Recipe:
        return load_recipe(self.recipe, overrides)

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


def fingerprint(recipe: Recipe) -> dict[str, str]:
    """A short hash of each identity section, by its name."""
    dumped = recipe.model_dump(mode="json")
    # What runs a teacher, and where, may change between two starts; what it is and what it hands over may not.
    dumped["teacher"] = [[t.name, t.model, t.k, t.dtype, recipe.targets] for t in recipe.teachers]
    return {
        name: hashlib.sha256(json.dumps(dumped[name], sort_keys=True).encode()).hexdigest()[:16] for name in IDENTITY
    }
