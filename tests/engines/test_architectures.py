"""docs/models.md against the engines: each architecture matches its row, and the script writes that table."""

from __future__ import annotations

from pathlib import Path

import architectures
import make_models_table as table
import matrix
import pytest
from conftest import SLOW

NAMES = list(architectures.ARCHITECTURES)
# A window in the mask alone; a rope that depends on the length; a state; sinks; soft caps; a choice of keys;
# no decoder.
QUICK = ("qwen2_moe", "phi3 longrope", "lfm2", "gpt_oss", "gemma2", "deepseek_v32", "t5")
GROUPS = 12


def check(name: str, folder: Path) -> None:
    assert table.row(name, matrix.verdict(name, folder / name.replace(" ", "-"))) == table.rows()[name]


@pytest.mark.parametrize("name", QUICK)
def test_an_architecture_is_what_its_row_says(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@SLOW
@pytest.mark.parametrize("group", range(GROUPS))
def test_every_architecture_is_what_its_row_says(group: int, tmp_path: Path) -> None:
    for name in NAMES[group::GROUPS]:
        check(name, tmp_path)


def test_the_table_has_a_row_for_every_architecture_and_is_as_the_script_writes_it() -> None:
    found = table.rows()
    assert list(found) == NAMES
    assert table.TABLE.read_text() == table.ABOUT + "".join(line + "\n" for line in found.values())


def test_the_matrix_passes_every_window_chunk_and_switch() -> None:
    longest = max(prompt + new for prompt, new in matrix.LENGTHS)
    assert max(architectures.WINDOW, architectures.CHUNK, architectures.SWITCH) < longest <= matrix.LONGEST
    crossing = [prompt for prompt, new in matrix.LENGTHS if prompt < architectures.SWITCH < prompt + new]
    assert crossing  # a response grows past the switch
