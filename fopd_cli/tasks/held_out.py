"""What is held out of data that came in one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DEFAULT = 256
SHARE = 10  # at most one in so many


def size(asked: int | None, there: int, shared: bool) -> int:
    """How many of `there` are held out if the recipe asks for so many, or does not say. `shared`: the rest is
    trained on.
    """
    if asked is not None:
        return asked
    return min(DEFAULT, max(1, there // SHARE)) if shared else DEFAULT


def drawn(identities: Sequence[str], count: int) -> list[int]:
    """The positions of those that are held out, in order: by their text alone, so that neither their order
    nor rows that are added later make one that was trained on a held-out one, or the other way round, but for
    the few at the edge.
    """
    ranked = sorted(
        range(len(identities)), key=lambda i: hashlib.sha256(identities[i].encode(errors="replace")).digest()
    )
    return sorted(ranked[:count])
