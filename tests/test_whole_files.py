"""Files are whole at any moment, and a full disk costs nothing that was written before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import full_at

from fopd_cli.errors import UserError, disk_error
from fopd_cli.evaluation import _Book
from fopd_cli.files import Appender, write_synced
from fopd_cli.report import suites


def test_what_a_full_disk_refuses_is_written_later_in_order(tmp_path: Path) -> None:
    refused: list[tuple[Path, int | None]] = []
    path = tmp_path / "lines"
    file = Appender(path, refused=lambda path, error: refused.append((path, error.errno)))
    pieces = [f"{i} {'x' * 20}\n".encode() for i in range(9)]
    file.write(pieces[0])
    with full_at(60):
        for piece in pieces[1:6]:
            file.write(piece)
            whole = path.read_bytes().splitlines(keepends=True)
            assert whole == pieces[:2], "no half a line, and none that overtakes another"
        with pytest.raises(OSError, match="File too large"):
            file.flush()
    assert refused == [(path, 27)] * 4
    assert file.waiting == 4
    for piece in pieces[6:]:
        file.write(piece)
    assert path.read_bytes() == b"".join(pieces)
    assert file.waiting == 0
    with full_at(60), pytest.raises(OSError, match="File too large"):
        Appender(path).write(b"more")  # nobody to tell


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_synced(path, "before")
    with full_at(10), pytest.raises(OSError, match="File too large") as full:
        write_synced(path, "x" * 100)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    assert disk_error(full.value) == "[Errno 27] File too large"


def test_an_evaluation_goes_on_from_the_rows_that_a_full_disk_took(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"number": n, "text": "x" * 30} for n in range(5)]
    with _Book(path, "digest") as book:
        book.write(rows[0])
        with full_at(path.stat().st_size + 20), pytest.raises(UserError, match=r"cannot write .*too large"):
            book.write(rows[1])
        assert [json.loads(line) for line in path.read_text().splitlines()][1:] == rows[:1]
    with _Book(path, "digest") as again:
        assert again.rows == {0: rows[0]}
        for row in rows[1:]:
            again.write(row)
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == rows


def test_figures_of_a_suite_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / suites.FILE
    suites.write(path, [{"suite": "a", "value": 1}])
    before = path.read_text()
    with full_at(len(before) + 5), pytest.raises(UserError, match=r"cannot write .*too large"):
        suites.write(path, [{"suite": "b", "value": 2}])
    assert path.read_text() == before
