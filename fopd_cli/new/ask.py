"""The questions of `fopd new`, each with a default that Enter accepts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from fopd_cli.errors import UserError
from fopd_cli.new.models import nearby

SMALL, LARGE = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"
KINDS = ("*.jsonl", "*.parquet", "*.csv", "*.json")

Ask = Callable[[str, str | None], str]


def complete(
    student: str | None, teacher: str | None, data: str | None, ask: Ask | None
) -> tuple[str, str, str]:
    """Ask for what the flags leave open. Raises `UserError` if that is impossible (`ask` is None)."""
    given = {"--student": student, "--teacher": teacher, "--data": data}
    missing = [name for name, value in given.items() if value is None]
    if missing and ask is None:
        raise UserError(
            f"{', '.join(missing)}: not given, and there is no terminal to ask in; "
            "fopd new [DIR] --student S --teacher T --data FILE"
        )
    if missing and ask is not None:
        here = nearby(Path())
        if student is None:
            student = ask("Student (a directory or a hub id; it is trained)", here[0] if here else SMALL)
        if teacher is None:
            rest = [name for name in here if name != student]
            teacher = ask("Teacher (of the same family, larger)", rest[-1] if rest else LARGE)
        if data is None:
            files = sorted(p for kind in KINDS for p in Path().glob(kind))
            data = ask("Questions (a file, a directory, hf:owner/name)", str(files[0]) if files else None)
    assert student is not None
    assert teacher is not None
    assert data is not None
    return student, teacher, data


def at_terminal() -> bool:
    """Whether there is a user to ask."""
    return sys.stdin.isatty() and sys.stderr.isatty()
