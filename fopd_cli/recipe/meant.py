"""What the user may have meant by an unknown key or value."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence

from fopd_cli.recipe.explain import explain
from fopd_cli.recipe.renames import RENAMED, new_name

SHORT_WORD = 3  # letters: shorter ones, like "of", say nothing


def meant(unknown: str, section: Sequence[str]) -> str | None:
    """The key most likely meant by one that `section` does not have: one there that is spelled like it or
    whose meaning has its words (`learning_rate` is lr), else one of another section, with that section's
    name.
    """
    keys = _keys()
    prefix = ".".join(p for p in section if not p.isdigit())
    here = {_last(key): meaning for key, meaning in keys.items() if _parent(key) == prefix}
    inner = {key.split(".")[0].partition("[")[0] for key in keys} if not prefix else set()
    if near := difflib.get_close_matches(unknown, [*here, *inner], n=1):
        return near[0]
    words = [w for w in unknown.lower().split("_") if len(w) >= SHORT_WORD]
    if by_meaning := _with_words(words, here):
        return by_meaning
    elsewhere = [key for key in keys if _last(key) == unknown]
    elsewhere += [new_name(old) for old in RENAMED if _last(old) == unknown]
    elsewhere += [key for key in keys if difflib.SequenceMatcher(None, _last(key), unknown).ratio() > 0.85]
    return elsewhere[0] if elsewhere else _with_words(words, keys)


@functools.cache
def _keys() -> dict[str, str]:
    return {key: meaning for key, _, _, meaning in explain()}


def _with_words(words: Sequence[str], keys: dict[str, str]) -> str | None:
    """The key whose first sentence has all of the words, the shortest such sentence first."""
    if not words:
        return None
    sentences = {
        key: re.split(r"[.;:](?: |$)", f"{_last(key)} {meaning}")[0].lower() for key, meaning in keys.items()
    }
    found = [key for key, sentence in sentences.items() if all(word in sentence for word in words)]
    return min(found, key=lambda key: len(sentences[key]), default=None)


def near_value(got: str, allowed: Sequence[str]) -> str:
    """A hint to append to an error; empty if nothing is near."""
    spelt = {value.lower(): value for value in allowed}
    plain = got.lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(plain, spelt, n=1, cutoff=0.55)
    return f"; did you mean {spelt[near[0]]!r}?" if near else ""


def _parent(key: str) -> str:
    return re.sub(r"\[[^]]*\]", "", key.rpartition(".")[0])


def _last(key: str) -> str:
    return key.rpartition(".")[2]
