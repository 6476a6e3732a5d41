"""Whether two tokenizers' ids mean the same, and which ids to exchange if only special tokens differ.

Distillation compares two distributions token by token, so ordinary tokens must agree, id by id. Special
tokens stand for no text: another name for the same id changes nothing, and the same names at other ids are a
permutation, which a table undoes on the teacher's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN = 8


@dataclass(frozen=True)
class Match:
    """The result of a comparison. Ids are below `vocab`, the ones that both models have."""

    different: list[str]  # one per id that means something else, if they cannot be matched; else empty
    shared: int  # ids that both tokenizers know
    # "151643 '<|endoftext|>' as 151643 '<eos>'": the student's special tokens and the teacher's
    renamed: list[str]
    beyond: int  # ids that only one of the two has
    table: np.ndarray | None  # int32 (vocab,): the student's id -> the teacher's; None: all ids are the same


def match(student: Any, teacher: Any, vocab: int) -> Match:
    """Compare the two; special tokens are paired by name, and what is left over by id."""
    ours, theirs = _by_id(student, vocab), _by_id(teacher, vocab)
    shared = ours.keys() & theirs.keys()
    different = sorted(i for i in shared if ours[i] != theirs[i])
    pairs = _pairs(different, ours, theirs, _added(student), _added(teacher))
    if pairs is None:
        what = [f"{i}: {ours[i]!r} against {theirs[i]!r}" for i in different]
        return Match(what, len(shared), [], 0, None)
    table = None
    if any(a != b for a, b in pairs.items()):
        table = np.arange(vocab, dtype=np.int32)
        table[list(pairs)] = list(pairs.values())
    renamed = [f"{a} {ours[a]!r} as {b} {theirs[b]!r}" for a, b in sorted(pairs.items())]
    return Match([], len(shared), renamed, len(ours.keys() ^ theirs.keys()), table)


def _pairs(
    different: list[int],
    ours: dict[int, str],
    theirs: dict[int, str],
    our_added: set[int],
    their_added: set[int],
) -> dict[int, int] | None:
    """Each differing id of the student -> the teacher's id for it; None if that is unknown."""
    if not set(different) <= our_added & their_added:
        return None
    at = {theirs[i]: i for i in different}
    pairs = {i: at[ours[i]] for i in different if ours[i] in at}
    left, right = (sorted(set(different) - set(done)) for done in (pairs, pairs.values()))
    if left == right:
        return pairs | dict(zip(left, right, strict=True))
    if len(left) == 1:  # one for one, whatever their ids
        return pairs | {left[0]: right[0]}
    return None


def _by_id(tokenizer: Any, vocab: int) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items() if i < vocab}


def _added(tokenizer: Any) -> set[int]:
    """Ids of tokens that are matched whole and are not in the tokenizer's own vocabulary of pieces."""
    return special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that stand for no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def exchanged(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The ids mapped by the table. Those past its end, which one of the models lacks, stay."""
    found, inside = ids.copy(), ids < len(table)
    found[inside] = table[ids[inside]]
    return found


def inverse(table: np.ndarray) -> np.ndarray:
    """int32 (vocab,): the teacher's id -> the student's."""
    back = np.empty_like(table)
    back[table] = np.arange(len(table), dtype=table.dtype)
    return back


def listed(items: list[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
