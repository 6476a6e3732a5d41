"""Keys that were renamed: the next version will not know their old names; this one reads them with a note."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from fopd_cli.errors import UserError

# The full key of a value or of a section -> its last part now.
RENAMED = {"schedule.depth": "max_lag", "freshness.replay": "reexecute"}


def new_name(old: str) -> str:
    """The full key that a key of `RENAMED` has now."""
    return f"{old.rpartition('.')[0]}.{RENAMED[old]}"


def renamed(key: str) -> str:
    """Any full key, such as `freshness.replay.share`, under its present name."""
    old = next((old for old in RENAMED if _within(key, old)), None)
    return key if old is None else new_name(old) + key.removeprefix(old)


def rename(raw: dict[str, Any], where: str) -> list[str]:
    """Give the keys of a parsed recipe their present names, in place; returns the old names that were there.

    Raises `UserError`, which names `where`, if a key is there under both names.
    """
    found = []
    for old, name in RENAMED.items():
        *parents, last = old.split(".")
        section: Any = raw
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            if name in section:
                raise _both(where, old)
            section[name] = section.pop(last)
            found.append(old)
    return found


def rename_override(override: str, others: Sequence[str]) -> tuple[str, list[str]]:
    """The same for one KEY=VALUE; `others` are all that were given with it."""
    key = override.partition("=")[0]
    found = [old for old in RENAMED if _within(key, old)]
    for old in found:
        if any(_within(other.partition("=")[0], new_name(old)) for other in others):
            raise _both("--set", old)
    return renamed(key) + override.removeprefix(key), found


def note(where: str, old: str) -> None:
    """Tell the user about an old name."""
    told = f"note: {where}: {old} is now called {new_name(old)}; the next version will not know the old name"
    print(told, file=sys.stderr, flush=True)


note_once = functools.cache(note)  # for a file that a command reads more than once


def _both(where: str, old: str) -> UserError:
    return UserError(f"{where}: {new_name(old)} is given twice, once by its old name {old}; leave {old} out")


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith(f"{outer}.")
