"""What docs/staleness.md, its details and its figures are made of: the committed runs, and nothing else.

    python benchmarks/staleness.py --report     makes all of it again, without running anything

A page has each table between `<!-- rows: NAME -->` and `<!-- end -->`. A figure carries a fingerprint of the
runs that it was drawn from, so that one which was left behind is found without drawing it again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import staleness_report as report
from staleness_tables import tables
from staleness_text_report import summary, text_markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOYS = DOCS / "staleness"
TEXTS = ("text-cpu", "text-80", "text-gsm8k", "text-h100")  # folders of TOYS with runs of the real pair
PAGES = ("staleness.md", "staleness-details.md")
RUNS = "results.jsonl"
FIGURES = {
    "curves.png": ".",
    "lags.png": ".",
    "sensitivity.png": ".",
    "regions.png": ".",
    **{f"{name}/text.png": name for name in TEXTS},
}
BLOCK = re.compile(r"(<!-- rows: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROWS = "fopd-rows"  # the key of a figure's fingerprint


def fill(page: str, texts: Mapping[str, str]) -> str:
    """A page with the tables of today. `KeyError` for one that nobody makes."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{texts[found[2]]}\n\n{found[3]}", page)


def blocks(page: str) -> list[str]:
    """The names of its tables."""
    return [found[2] for found in BLOCK.finditer(page)]


def texts() -> dict[str, str]:
    """Every table that a page may have, by name."""
    found = tables(report.read(TOYS / RUNS))
    runs = {name: report.read(TOYS / name / RUNS) for name in TEXTS}
    found |= {name: text_markdown(own) for name, own in runs.items()}
    return {**found, "real_pair": summary(runs["text-cpu"])}


def committed() -> dict[Path, str]:
    """What each table file and each page must contain."""
    every = texts()
    pages = {DOCS / name: fill((DOCS / name).read_text(encoding="utf-8"), every) for name in PAGES}
    files = report.files(report.read(TOYS / RUNS))
    return {**{TOYS / name: text for name, text in files.items()}, **pages}


def fingerprint(runs: Path) -> str:
    """Of the runs in a file."""
    return hashlib.sha256(runs.read_bytes()).hexdigest()


def drawn_from(figure: Path) -> str | None:
    """The fingerprint that a PNG carries."""
    data, at = figure.read_bytes(), 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt" and key.decode() == ROWS:
            return value.decode()
        at += 12 + length
    return None


def draw(folder: Path) -> None:
    """The figures of the runs in a folder, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: matplotlib is not installed (pip install 'fopd[bench]')", file=sys.stderr)
        return
    import staleness_figures

    metadata = {ROWS: fingerprint(folder / RUNS)}
    staleness_figures.draw(folder, report.read(folder / RUNS), metadata)


def write() -> None:
    """All tables, figures and pages again, from the committed runs."""
    for path, text in committed().items():
        path.write_text(text, encoding="utf-8")
    for folder in (TOYS, *(TOYS / name for name in TEXTS)):
        draw(folder)
