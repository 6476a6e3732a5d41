"""Tokens as the pieces of text that people read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def pieces(tokenizer: Any, ids: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(text, first, end) of each token, in numbers of tokens. Tokens that only together make a character are
    one piece.
    """
    done, first = "", 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end].tolist()))
        if end < len(ids) and (text.endswith("\ufffd") or not text.startswith(done)):
            continue
        yield text[len(done) :], first, end
        done, first = text, end
