"""The reports that the documentation shows."""

from __future__ import annotations

from pathlib import Path

import browser_kit
import pytest
from conftest import ROOT, SLOW

from fopd_cli.report.page import MARK

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.html"))


def test_they_are_small_reports_that_pages_link_to() -> None:
    assert [path.stem for path in EXAMPLES] == ["quickstart", "staleness"]
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for path in EXAMPLES:
        assert path.read_text().startswith(MARK)
        assert path.stat().st_size < 1_000_000
        assert f"(examples/{path.name})" in pages


@SLOW
@browser_kit.needed
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_browser_draws_them_and_complains_of_nothing(path: Path, dark: bool, tmp_path: Path) -> None:
    assert browser_kit.drawn(path, tmp_path, dark) >= 8
