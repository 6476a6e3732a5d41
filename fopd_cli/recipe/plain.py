"""From text to plain data: mappings with text keys, lists, texts, numbers, true, false, null. Nothing here
knows a key.

YAML can express much more than a recipe needs: dates, sets, bytes, self-references, numbers with a million
digits. All of it is refused here at once, in one line, so that later code sees only plain data.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

import yaml

LONGEST_TEXT = 200_000  # characters of a recipe
MOST_VALUES = 20_000
DEEPEST = 40
LARGEST = 2**63  # of integers: later code computes in 64 bits


class NotPlain(Exception):
    """Why a text is not plain data. The message says where, if that is known."""


class NotYaml(NotPlain):
    """It is not even YAML."""


def parse(text: str) -> Any:
    """Raises `NotPlain`."""
    if len(text) > LONGEST_TEXT:
        raise NotPlain(f"is {len(text):,} characters long; a recipe has at most {LONGEST_TEXT:,}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise NotYaml(f"is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise NotPlain("is nested too deeply") from None
    except Exception as error:  # PyYAML raises anything: for an impossible date, a number of 5,000 digits
        raise NotPlain(f"holds a value that YAML cannot read: {error}") from None
    _check(value, "", (), [MOST_VALUES])
    return value


def _check(value: Any, key: str, above: tuple[int, ...], left: list[int]) -> None:
    """`above`: the ids of the values around it. `left`: how many more values are allowed; an alias counts
    each time.
    """
    left[0] -= 1
    if left[0] < 0:
        raise NotPlain(f"holds more than {MOST_VALUES:,} values")
    if id(value) in above and isinstance(value, dict | list):
        raise NotPlain(f"{_at(key)}refers to itself")
    if len(above) > DEEPEST:
        raise NotPlain(f"{_at(key)}is nested too deeply")
    within = (*above, id(value))
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise NotPlain(f"{_at(key)}the key {shown(name)} must be a text; put it in quotes")
            _check_text(name, key)
            _check(inner, f"{key}.{name}" if key else name, within, left)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check(inner, f"{key}.{i}" if key else str(i), within, left)
    elif isinstance(value, str):
        _check_text(value, key)
    elif isinstance(value, int):
        if abs(value) >= LARGEST:
            raise NotPlain(f"{_at(key)}whole numbers must be under 2^63")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotPlain(f"{_at(key)}{value} is not a finite number")
    elif value is not None:
        raise NotPlain(
            f"{_at(key)}{shown(value)} is of the type {type(value).__name__}; put it in quotes if it is a "
            "text"
        )


def _check_text(text: str, key: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotPlain(
            f"{_at(key)}{shown(text)} holds half a character, which cannot be stored in a file"
        ) from None


def _at(key: str) -> str:
    return f"{shown_key(key)}: " if key else ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 4
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print integers with thousands of digits
        return f"a {type(value).__name__} too long to show"


def shown_key(key: str) -> str:
    """A key for an error message: unchanged if printable and short, else cut and quoted."""
    return key if key.isprintable() and len(key) <= 120 else shown(key)
