"""Whether a path is there, for paths that people wrote: one that cannot exist (too long, a null byte) is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def is_dir(path: Path | str) -> bool:
    return _try(path, Path.is_dir)


def is_file(path: Path | str) -> bool:
    return _try(path, Path.is_file)


def exists(path: Path | str) -> bool:
    return _try(path, Path.exists)


def _try(path: Path | str, test: Callable[[Path], bool]) -> bool:
    try:
        return test(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~nobody
        return False
