"""How `fopd chat` shows text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from fopd_cli.chat import coloured, numbered
from fopd_cli.engines.text.pieces import pieces


def test_colours_begin_where_the_two_are_apart() -> None:
    found = [("a", 0.01), ("b", 0.1), ("c", 0.5), ("d", 3.0), ("e", float("nan"))]
    shown = coloured(found)
    assert shown.startswith("a\x1b[48;5;229;30mb\x1b[0m\x1b[48;5;215;30mc\x1b[0m\x1b[48;5;203;30md\x1b[0m")
    assert shown.endswith("\x1b[0me")
    assert numbered([("a\n", 0.014), ("b", float("nan"))]) == "a⏎[0.01]b"


def test_tokens_that_only_together_make_a_character_are_one_piece(pair: Path) -> None:
    """The tiny pair has a byte tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    ids = np.asarray(tokenizer("aü€b", add_special_tokens=False)["input_ids"])
    assert len(ids) == 7
    assert list(pieces(tokenizer, ids)) == [("a", 0, 1), ("ü", 1, 3), ("€", 3, 6), ("b", 6, 7)]
