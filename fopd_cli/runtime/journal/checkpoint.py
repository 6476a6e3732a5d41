"""Checkpoints: whole or absent. Written beside their final name, hashed, synced to disk, renamed; then old
ones are removed.

checkpoints/step-000100/
    learner/             torch.distributed.checkpoint: any number of ranks reads it
    buffer.safetensors   rollouts in flight with their teacher targets
    published.bin        weights of the previous version, where a fixed lag still samples with them
    state.json           recipe, schedule, accounting, refresh, noise floor, evaluations, totals
    MANIFEST.json        size and SHA-256 of every other file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.files import sync, write_synced

FORMAT = 2
SUPERSEDED = ".superseded"


class Rhythm:
    """When the next checkpoint is due: after every `every` optimizer steps, and `minutes` after the last one.

    A failed save counts, too: a full disk is tried again later, not at once.
    """

    def __init__(self, every: int, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.minutes, self.clock = every, minutes, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether one is due after this optimizer step; 0 turns either rule off."""
        by_steps = self.every > 0 and step % self.every == 0
        return by_steps or (self.minutes > 0 and self.clock() - self._last >= 60 * self.minutes)

    def saved(self) -> None:
        self._last = self.clock()


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def state(self, step: int) -> dict[str, Any]:
        """All of a checkpoint except the learner's part, the buffer and the weights."""
        return dict(json.loads((self.path(step) / "state.json").read_text()))

    def open(self, step: int | None) -> None:
        """For the process that trains: prepare the folder. A run that goes on from `step` sets later
        checkpoints aside.

        They are kept until the run has come as far itself, but the next plain resume must not start from
        them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        for later in self.steps():
            if step is not None and later > step:
                aside = self.path(later).with_suffix(SUPERSEDED)
                if aside.exists():
                    shutil.rmtree(aside)
                self.path(later).rename(aside)

    def begin(self, step: int) -> Path:
        """A fresh folder to write into."""
        temporary = self.folder / f"step-{step:06d}.tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, state: str, known: Mapping[str, dict[str, Any]]) -> Path:
        """Complete it with `state`, the text of state.json, make it final, then remove those beyond `keep`.
        Raises OSError, leaving the older ones intact.

        `known` has the manifest's entries of files that need not be hashed again.
        """
        write_synced(temporary / "state.json", state)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        names = {str(p.relative_to(temporary)): p for p in files}
        entries = {name: known.get(name) or described(path) for name, path in names.items()}
        write_synced(temporary / "MANIFEST.json", json.dumps({"format": FORMAT, "files": entries}, indent=1))
        for path in files:
            sync(path)
        for folder in {p.parent for p in files} | {temporary}:
            sync(folder)
        final = temporary.with_suffix("")
        temporary.rename(final)
        sync(self.folder)
        for old in self.steps()[: -self.keep]:
            leaving = self.path(old).rename(
                self.path(old).with_suffix(".tmp")
            )  # killed meanwhile: no half one
            shutil.rmtree(leaving)
        newest = self.steps()[-1]
        for aside in self.folder.glob(f"step-*{SUPERSEDED}"):
            if int(aside.stem.removeprefix("step-")) <= newest:
                shutil.rmtree(aside)
        return final

    def discard(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        names = (p.name.removeprefix("step-") for p in self.folder.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def newest_sound(self) -> tuple[int, list[str]]:
        """(step, what is wrong with newer ones) of the newest checkpoint that verifies."""
        problems: list[str] = []
        for step in reversed(self.steps()):
            problem = verify(self.path(step))
            if problem is None:
                return step, problems
            problems.append(problem)
        detail = f": {'; '.join(problems)}" if problems else ""
        raise UserError(f"{self.folder}: there is no complete checkpoint to resume from{detail}")


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (OSError, ValueError):
        return f"{folder} has no readable MANIFEST.json"
    if manifest.get("format") != FORMAT:
        return f"{folder} has format {manifest.get('format')}, this fopd reads {FORMAT}"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{path} is damaged (its SHA-256 is not the manifest's)"
    return None


def described(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
