"""Prompts computed once: what several sequences of a packed row begin with lies in the row once.

The samples of one prompt share all of it, and every prompt of a run shares its system message. A row is made
of segments; a sequence is a path of them, and a segment attends to the segments before it on its path, and to
itself:

    a b c d        segments   [a b] [c d] [e f g]      segment     prefix
    a b e f g      paths      0 1, 0 2                 [c d]       [a b]

The numbers, gradients too, are those of each sequence alone: a causal model computes the shared tokens alike
in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

WORTH = 16  # tokens: what is shorter costs more in pieces than it saves


@dataclass
class SharedRow:
    """`n` segments of one row, in order."""

    tokens: list[np.ndarray] = field(default_factory=list)  # token ids of each segment
    offsets: list[int] = field(default_factory=list)  # position of its first token in its sequences
    prefixes: list[tuple[int, ...]] = field(default_factory=list)  # the segments before it on its path
    paths: list[tuple[int, ...]] = field(default_factory=list)  # of each sequence

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> SharedRow:
        """The sequences' row: a trie whose edges are segments, none of those that are shared under `WORTH`
        tokens.
        """
        row = cls(paths=[()] * len(sequences))
        row._visit(sequences, list(range(len(sequences))), 0, ())
        return row

    @classmethod
    def apart(cls, sequences: Sequence[np.ndarray]) -> SharedRow:
        """A segment for each sequence, nothing shared."""
        n = len(sequences)
        return cls(list(sequences), [0] * n, [()] * n, [(i,) for i in range(n)])

    @property
    def starts(self) -> np.ndarray:
        """int64 `(n + 1,)`: where each segment begins in the row, and where the last one ends."""
        return np.cumsum([0, *(len(t) for t in self.tokens)])

    def places(self) -> list[np.ndarray]:
        """int64 `(length,)` of each sequence: where its tokens lie in the row."""
        starts = self.starts
        return [np.concatenate([np.arange(starts[s], starts[s + 1]) for s in path]) for path in self.paths]

    def _visit(
        self, sequences: Sequence[np.ndarray], members: list[int], start: int, path: tuple[int, ...]
    ) -> None:
        """Lay out what follows `start` in these sequences, which are equal up to there."""
        alike: dict[bytes, list[int]] = {}
        for i in members:
            ahead = sequences[i][start : start + WORTH]
            key = ahead.tobytes() if len(ahead) == WORTH else b"alone %d" % i
            alike.setdefault(key, []).append(i)
        for group in alike.values():
            own = [sequences[i] for i in group]
            stop = len(own[0]) if len(group) == 1 else start + _common(own, start)
            below = path
            if stop > start:
                below = (*path, len(self.tokens))
                self.tokens.append(own[0][start:stop])
                self.offsets.append(start)
                self.prefixes.append(path)
            if len(group) == 1:
                self.paths[group[0]] = below
            else:
                self._visit(sequences, group, stop, below)


def _common(sequences: Sequence[np.ndarray], start: int) -> int:
    """Tokens from `start` on that all of them share."""
    shortest = min(len(s) for s in sequences)
    table = np.stack([s[start:shortest] for s in sequences])
    different = np.flatnonzero((table != table[0]).any(0))
    return int(different[0]) if len(different) else shortest - start
