"""The run directory: made once, locked while in use, never overwritten.

runs/NAME/
    recipe.yaml  recipe-history.jsonl      resolved; what was changed at which step
    placement.json                         its workers, devices and cores
    metrics.jsonl  ledger.jsonl  samples.jsonl  warnings.jsonl  trace.json  tensorboard/  logs/WORKER.log
    checkpoints/step-000100/  best/        what a resume starts from; weights of eval.keep_best
    student/  summary.json                 the end: the student in Hugging Face's format
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fopd_cli import paths
from fopd_cli.errors import UserError
from fopd_cli.files import write_synced
from fopd_cli.recipe import Recipe, dump_recipe, load_recipe
from fopd_cli.recipe.renames import renamed
from fopd_cli.runtime.journal.checkpoint import verify
from fopd_cli.runtime.journal.sinks import Changes, JsonLines, Resume

LOCK = "run.lock"
RECORDS = ("metrics.jsonl", "ledger.jsonl", "samples.jsonl", "warnings.jsonl")


class RunDir:
    """Paths of a run, and the lock that keeps two processes out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.student = path / "student"
        self.best = path / "best"
        self.recipe = path / "recipe.yaml"
        self.history = path / "recipe-history.jsonl"
        self.summary = path / "summary.json"
        self.placement = path / "placement.json"
        self._lock: Any = None

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunDir:
        """Refuses a directory that holds anything except a start that came to nothing, which it replaces."""
        run = cls(path)
        run._make()
        write_synced(run.recipe, dump_recipe(recipe))
        return run

    def _make(self) -> None:
        """The directory, locked."""
        path = self.path
        if paths.exists(path) and (
            not path.is_dir() or (any(path.iterdir()) and not self._came_to_nothing())
        ):
            raise UserError(
                f"--run-dir: {path} exists and is not empty; {self._hint()}give another --run-dir"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock()
            if self.logs.exists():
                shutil.rmtree(self.logs)
            self.logs.mkdir()
        except OSError as error:
            raise UserError(f"--run-dir: cannot make {path}: {error.strerror}") from None

    def _came_to_nothing(self) -> bool:
        """Whether the start was refused, interrupted or killed before all workers were ready: records begin
        later.
        """
        held = {p.name for p in self.path.iterdir() if not p.name.startswith(".rendezvous-")}
        return self.recipe.name in held and held <= {self.recipe.name, LOCK, self.logs.name}

    def _hint(self) -> str:
        if not self.recipe.is_file():
            return ""
        if any(self.checkpoints.glob("step-*/MANIFEST.json")):
            return f"continue it (fopd resume {self.path}) or "
        return "it is a run that ended before its first checkpoint: delete it, or "

    def fork(self, new: Path, step: int) -> RunDir:
        """A new directory with this run's checkpoint and records up to that step. Checkpoints are never
        written to again, so the two may share files.
        """
        run = RunDir(new)
        run._make()
        try:
            at = run.checkpoints / f"step-{step:06d}"
            shutil.copytree(self.checkpoints / at.name, at, copy_function=_linked)
            if damage := verify(at):  # the original, still running, has just removed it
                raise UserError(f"--step: {damage}; take another checkpoint")
            for name in (self.recipe.name, self.history.name, *RECORDS):
                if (self.path / name).exists():
                    _copy_until(self.path / name, new / name, step)
            for file in self.best.glob("step-*.safetensors"):
                if int(file.stem.removeprefix("step-")) <= step:
                    run.best.mkdir(exist_ok=True)
                    _linked(str(file), str(run.best / file.name))
            if (self.path / "tensorboard").is_dir():
                shutil.copytree(self.path / "tensorboard", new / "tensorboard")
            origin = {"run": str(self.path.resolve()), "step": step}
            write_synced(new / "forked-from.json", json.dumps(origin) + "\n")
        except OSError as error:
            shutil.rmtree(new)
            raise UserError(
                f"--run-dir: cannot fork {self.path} to {new}: {error.strerror or error}"
            ) from None
        except UserError:
            shutil.rmtree(new)
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run."""
        run = cls(path)
        if not paths.is_file(run.recipe):
            raise UserError(f"{path}: is not a run directory (it has no recipe.yaml){paths.similar(path)}")
        return run

    def load_recipe(self, overrides: list[str]) -> Recipe:
        return load_recipe(self.recipe, overrides)

    def changed(self) -> list[tuple[int, dict[str, list[Any]]]]:
        """The history: (step, key -> [value before, value since]), oldest first."""
        found = []
        for line in self.history.read_text(encoding="utf-8").splitlines() if self.history.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                record = json.loads(line)
                found.append(
                    (
                        int(record["step"]),
                        {renamed(key): values for key, values in dict(record["changed"]).items()},
                    )
                )
        return found

    def take_up(self, recipe: Recipe, resume: Resume, changes: Changes) -> None:
        """The run goes on with this recipe; changes go into the history."""
        text = dump_recipe(recipe)
        if text != self.recipe.read_text(encoding="utf-8"):
            write_synced(self.recipe, text)
        if changes or self.history.exists():
            history = JsonLines(self.history, resume)
            if changes:
                history.write({"step": resume.step, "changed": changes})
            history.close()

    def lock(self) -> None:
        """Hold the directory for this process; the kernel releases it when the process dies, for whatever
        reason.
        """
        if self._lock is not None:
            return
        file = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{self.path}: is in use by the live process {file.read().strip() or '?'}; wait for it or "
                "stop it first"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file


def _linked(source: str, target: str) -> None:
    """Link a file under a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _copy_until(source: Path, target: Path, step: int) -> None:
    """Copy records up to a step; copy other files unchanged, the history too (a resume takes back later
    changes).
    """
    text = source.read_text(encoding="utf-8")
    if source.name in RECORDS:
        kept = []
        for line in text.splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        text = "".join(kept)
    target.write_text(text, encoding="utf-8")
