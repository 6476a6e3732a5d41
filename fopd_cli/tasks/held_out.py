"""Which rows are held out, and of which sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

DEFAULT = 256
SHARE = 10  # at most one in this many


class HeldOut(NamedTuple):
    """One held-out source. `key` names it in errors; `name` is None if it is the only one."""

    name: str | None
    key: str
    source: str


def sources(asked: str | Mapping[str, str] | None) -> list[HeldOut]:
    """What task.eval names, in its order."""
    if asked is None:
        return []
    if isinstance(asked, str):
        return [HeldOut(None, "task.eval", asked)]
    return [HeldOut(name, f"task.eval.{name}", source) for name, source in asked.items()]


def size(asked: int | None, there: int, shared: bool) -> int:
    """How many of `there` rows to hold out: as many as the recipe asks for, if it does. `shared`: the rest is
    trained on.
    """
    if asked is not None:
        return asked
    return min(DEFAULT, max(1, there // SHARE)) if shared else DEFAULT


def drawn(identities: Sequence[str], count: int) -> list[int]:
    """The positions of the held-out rows, in order, chosen only by their text. So neither their order nor
    rows added later move a row from training to held-out or back, except for a few at the boundary.
    """
    ranked = sorted(
        range(len(identities)), key=lambda i: hashlib.sha256(identities[i].encode(errors="replace")).digest()
    )
    return sorted(ranked[:count])
