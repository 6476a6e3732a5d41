"""SWE-bench-style instances: from files or the hub, with the columns of SWE-bench and a few of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.tasks.files import read_rows


@dataclass(frozen=True)
class Instance:
    """A repository, its problem, and the tests that decide.

    Where the repository is: `files` (path -> text, in the row itself), `directory` (on this machine), or a
    container `image` that holds it under /testbed.
    """

    id: str
    problem: str
    fail_to_pass: tuple[str, ...]  # tests that fail before and must pass after
    pass_to_pass: tuple[str, ...]  # tests that pass before and must still pass after
    test_patch: str = ""  # applied before the tests are run
    test_command: str | None = None  # None: pytest; test names are appended
    files: dict[str, str] | None = None
    directory: Path | None = None
    image: str | None = None
    place: str | None = None  # its row, for errors


def load_instances(source: str, key: str) -> list[Instance]:
    """All rows of a source. Raises `UserError` for a row that is not an instance."""
    return [_instance(row.values, row.place, key, source) for row in read_rows(source, key)]


def _instance(row: dict[str, Any], place: str, key: str, source: str) -> Instance:
    where = f"{key}: {place}"
    missing = [
        name
        for name in ("instance_id", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")
        if name not in row
    ]
    if missing:
        raise UserError(f"{where} has no column {missing[0]!r}, which every SWE-bench instance has")
    for name in ("instance_id", "problem_statement"):
        if row[name] is None or not str(row[name]).strip():
            raise UserError(
                f"{where}: column {name!r} is {'null' if row[name] is None else 'empty'}; leave the row out"
            )
    directory = row.get("directory")
    if directory is not None:
        directory = ((folder if (folder := Path(source)).is_dir() else folder.parent) / directory).resolve()
        if not directory.is_dir():
            raise UserError(f"{where}: there is no directory {directory}")
    return Instance(
        id=str(row["instance_id"]),
        problem=str(row["problem_statement"]),
        fail_to_pass=_names(row["FAIL_TO_PASS"], where),
        pass_to_pass=_names(row["PASS_TO_PASS"], where),
        test_patch=row.get("test_patch") or "",
        test_command=row.get("test_command"),
        files=_contents(row.get("files")),
        directory=directory,
        image=row.get("image_name") or row.get("docker_image") or official_image(str(row["instance_id"])),
        place=place,
    )


def _contents(files: Any) -> dict[str, str] | None:
    """Path -> text. In a csv file it is JSON; in a parquet file every row has the paths of all rows, null if
    not its own.
    """
    found = json.loads(files) if isinstance(files, str) else files
    return None if found is None else {path: text for path, text in found.items() if text is not None}


def official_image(instance_id: str) -> str:
    """SWE-bench's own image on Docker Hub, whose names must not contain double underscores."""
    return f"docker.io/swebench/sweb.eval.x86_64.{instance_id.replace('__', '_1776_')}:latest".lower()


def _names(value: Any, where: str) -> tuple[str, ...]:
    """A list, or (as on the hub) a list written as JSON."""
    try:
        names = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list):
        raise UserError(f"{where}: FAIL_TO_PASS and PASS_TO_PASS must be lists of test names")
    return tuple(map(str, names))
