"""Results of `fopd eval --suite`: records of the lm-evaluation-harness's figures, and their table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fopd_cli.errors import UserError
from fopd_cli.files import Appender
from fopd_cli.report.reading import Record, jsonl

FILE = "suite.jsonl"  # in the run directory


def write(path: Path, records: Iterable[Record]) -> None:
    """Append. Raises `UserError`."""
    try:
        with contextlib.closing(Appender(path)) as file:
            file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
    except OSError as error:
        raise UserError(f"--suite: cannot write {path}: {error.strerror}") from None


def newest(run: Path) -> list[Record]:
    """The run's figures; the newest one if a model has a figure several times."""
    latest = {(r["suite"], r["metric"], r["filter"], r["who"]): r for r in jsonl(run / FILE) if "suite" in r}
    return list(latest.values())


def table(records: Sequence[Record]) -> list[list[str]]:
    """A header, then a row per figure with a column per model. Members of a group are left out."""
    shown = [r for r in records if not r["member"]]
    who = list(dict.fromkeys(r["who"] for r in shown))
    by_figure: dict[tuple[str, str, str], dict[str, Record]] = {}
    for r in shown:
        by_figure.setdefault((r["suite"], r["metric"], r["filter"]), {})[r["who"]] = r
    rows = [["suite", "metric", "samples", *(column(name, shown) for name in who)]]
    for (suite, metric, filtered), of in by_figure.items():
        first = next(iter(of.values()))
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        arrow = {True: " ↑", False: " ↓"}.get(first["higher_is_better"], "")
        counts = dict.fromkeys(_count(r) for r in of.values())
        rows.append([suite, label + arrow, " / ".join(counts), *(_figure(of.get(name)) for name in who)])
    return rows


def column(who: str, records: Sequence[Record]) -> str:
    """A column's name; for the student, with its step."""
    steps = dict.fromkeys(r["step"] for r in records if r["who"] == who and r["step"] is not None)
    return f"{who}, step {' / '.join(map(str, steps))}" if steps else who


def _count(record: Record) -> str:
    count = record["samples"]
    return "-" if count is None else f"{count}"


def _figure(record: Record | None) -> str:
    if record is None or record["value"] is None:
        return "-"
    error = record["error"]
    return f"{record['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
