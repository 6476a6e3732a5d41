"""Rows of data: jsonl, json, csv, parquet and arrow files, a directory of them, or a dataset on the hub."""

from __future__ import annotations

import contextlib
import csv
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fopd_cli import paths
from fopd_cli.errors import UserError

NEEDS_DATA = "pip install 'fopd[data]'"
# Files that dataset tools leave beside the rows.
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])")


class Row(NamedTuple):
    """`place` is for errors: "row 3 of 'x.jsonl'"; a jsonl file's rows are its lines, a csv file's come after
    the header.
    """

    place: str
    values: dict[str, Any]


def read_rows(source: str, key: str) -> list[Row]:
    """All rows of a file, a directory, or `hf:owner/name[@config][:split]`; at least one. `key` names it in
    errors.
    """
    if source.startswith("hf:"):
        rows = _of_hub(source, key)
    else:
        path = Path(source)
        files = _files(path, key) if path.is_dir() else [path]
        rows = [
            Row(f"row {n} of {str(file)!r}", values) for file in files for n, values in _of_file(file, key)
        ]
    if not rows:
        raise UserError(f"{key}: {source!r} has no rows")
    return rows


def column(row: Row, name: str, source_key: str, key: str) -> Any:
    """The value of a column; `a.b` is the column of that name, else b in a. Text on the way there is parsed
    as JSON.
    """
    if name in row.values:
        return row.values[name]
    value: Any = row.values
    for part in name.split("."):
        if isinstance(value, str):
            value = _parsed(value)
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            columns = sorted(map(str, row.values))
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean {key}: {_visible(near[0])}?" if near else f"set {key} to the right one"
            raise UserError(f"{source_key}: {row.place} has no column {name!r}; it has {columns}; {hint}")
    return value


def _visible(name: str) -> str:
    """Quoted if it has spaces at its ends, which would be invisible."""
    return name if name == name.strip() else repr(name)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _files(folder: Path, key: str) -> list[Path]:
    """The data files of a directory, by name. Raises `UserError` if there are none, or if they are of several
    splits.
    """
    inside = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in READERS and p.name not in METADATA]
    files = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{key}: {str(folder)!r} holds no data file; fopd reads {', '.join(READERS)}")
    splits = {found for p in files for found in SPLIT.findall(str(p.relative_to(folder)).lower())}
    if len(splits) > 1:
        raise UserError(
            f"{key}: {str(folder)!r} holds files of several splits ({', '.join(sorted(splits))}); name a "
            "file, or a directory of one split"
        )
    return files


def _of_file(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = READERS.get(path.suffix.lower())
    if not path.exists():
        raise UserError(f"{key}: there is no file {str(path)!r}{paths.similar(path)}")
    if reader is None:
        raise UserError(
            f"{key}: {str(path)!r} is of an unknown kind; fopd reads {', '.join(READERS)}, and directories"
        )
    try:
        yield from reader(path, key)
    except ImportError:
        raise UserError(f"{key}: {str(path)!r} needs the pyarrow package: {NEEDS_DATA}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {str(path)!r} is not text in UTF-8 (byte {error.start}); save it as UTF-8, or unpack "
            "it if it is compressed"
        ) from None
    except RecursionError:
        raise UserError(f"{key}: cannot read {str(path)!r}: its values are nested too deeply") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are among these
        raise UserError(f"{key}: cannot read {str(path)!r}: {_first_line(error)}") from None


def _jsonl(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path.read_text(encoding="utf-8-sig"), path, key)


def _lines(text: str, path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON's strings may hold U+2028
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)
                raise UserError(f"{key}: line {number} of {str(path)!r} is not JSON ({why})") from None
            if not isinstance(value, dict):
                raise UserError(f"{key}: line {number} of {str(path)!r} is not a JSON object")
            yield number, value


def _json(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """A list of objects, one such list under a single key, or a jsonl file (often named .json)."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text.strip():
            yield from _lines(text, path, key)
            return
        raise UserError(f"{key}: {str(path)!r} is not JSON ({error.msg}, line {error.lineno})") from None
    if isinstance(value, dict):
        (only,) = value.values() if len(value) == 1 else ([value],)
        value = only
    if not isinstance(value, list):
        raise UserError(f"{key}: {str(path)!r} must be a list of JSON objects")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{key}: row {number} of {str(path)!r} is not a JSON object")
        yield number, row


def _csv(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows below a header. An empty cell is null, since a csv file has no other way to say so.

    If the header has semicolons but no comma, they separate the cells, as spreadsheets write them in half the
    world.
    """
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        comma = ";" if "," not in first and ";" in first else ","
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else comma)
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header):
            raise UserError(f"{key}: the header of {str(path)!r} has {max(header, key=header.count)!r} twice")
        for number, cells in enumerate(filter(None, rows), 1):
            if len(cells) != len(header):
                raise UserError(
                    f"{key}: row {number} of {str(path)!r} has {len(cells)} cells, its header has "
                    f"{len(header)}; "
                    'put texts with commas or line breaks between "quotes"'
                )
            yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parquet(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    yield from enumerate(_texts(pyarrow.parquet.read_table(path, partitioning=None)).to_pylist(), 1)


def _arrow(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        try:
            table = pa.ipc.open_stream(file).read_all()
        except pa.ArrowInvalid:  # the other of Arrow's two formats
            table = pa.ipc.open_file(file).read_all()
    yield from enumerate(_texts(table).to_pylist(), 1)


def _texts(table: Any) -> Any:
    """Turn columns of bytes into text if they hold text: some writers do not mark it as such."""
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            with contextlib.suppress(pa.ArrowInvalid):  # images, say
                table = table.set_column(number, field.name, table.column(number).cast(pa.large_string()))
    return table


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}


def _of_hub(source: str, key: str) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{key}: {source!r} needs the datasets package: {NEEDS_DATA}") from None
    name, _, split = source.removeprefix("hf:").partition(":")
    name, _, config = name.partition("@")
    try:
        rows = list(load_dataset(name, config or None, split=split or "train"))
    except Exception as error:  # from the hub, the file system or pyarrow
        raise UserError(f"{key}: cannot load {source!r} from the hub: {_first_line(error)}") from None
    return [Row(f"row {n} of {source!r}", dict(values)) for n, values in enumerate(rows, 1)]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
