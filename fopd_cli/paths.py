"""Whether a user-written path exists; one that cannot exist (too long, a null byte) does not."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from pathlib import Path


def is_dir(path: Path | str) -> bool:
    return _try(path, Path.is_dir)


def is_file(path: Path | str) -> bool:
    return _try(path, Path.is_file)


def exists(path: Path | str) -> bool:
    return _try(path, Path.exists)


def similar(path: Path | str) -> str:
    """A hint for a missing path: a similarly spelled one beside it; empty if there is none."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        beside = {p.name: p for p in path.expanduser().parent.iterdir()}
        if near := difflib.get_close_matches(path.name, beside, n=1):
            return f"; did you mean {str(path.parent / near[0])!r}?"
    return ""


def _try(path: Path | str, test: Callable[[Path], bool]) -> bool:
    try:
        return test(Path(path).expanduser())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~nobody
        return False


def has_run(path: Path) -> bool:
    """Whether something has run in a directory; a recipe alone may be what `fopd new` wrote."""
    return any(is_file(path / name) for name in ("run.lock", "metrics.jsonl"))
