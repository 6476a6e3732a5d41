"""Tokens as the pieces of text that people read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def pieces(tokenizer: Any, ids: np.ndarray, kls: np.ndarray) -> Iterator[tuple[str, float]]:
    """(text, KL) of each token. Tokens that only together make a character are one piece, with the sum of
    their KLs.
    """
    done, kl = "", 0.0
    for i, value in enumerate(kls.tolist(), 1):
        kl += value
        text = str(tokenizer.decode(ids[:i].tolist()))
        if i < len(ids) and (text.endswith("\ufffd") or not text.startswith(done)):
            continue
        yield text[len(done) :], kl
        done, kl = text, 0.0
