"""Tables of throughput.py's results."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from throughput_trace import STAGES

Row = dict[str, Any]
END = "<!-- end of them -->"
WIDTH = 110  # of a page's lines


def read(path: Path) -> dict[str, Row]:
    """Results by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def line(row: Row) -> str:
    """One line for people who wait."""
    match row["kind"]:
        case "delay":
            return f"{row['key']}: {row['delay_ms']} ms a sample"
        case "alone":
            each = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in row["seconds"].items())
            return f"{row['key']}: {each} s a step"
        case _:
            idle = ", ".join(f"{stage} {row['shares'][stage]['idle']:.0%}" for stage in STAGES)
            return (
                f"{row['key']}: {row['seconds']:.3f} s a step, conductor {row['conductor']:.1%}, idle: {idle}"
            )


def begin(results: str) -> str:
    """Where a page has the tables of a file of results, by the file's name."""
    return f"<!-- tables of {results} -->"


def filled(page: str, results: str, tables: str) -> str:
    """A page with the tables of this file of results between their two marks."""
    before, found, rest = page.partition(begin(results))
    _, ended, after = rest.partition(END)
    if not found or not ended:
        sys.exit(f"--into: the page has no place for these tables, between {begin(results)} and {END}")
    return f"{before}{found}\n\n{tables}\n\n{END}{after}"


def spread(values: Sequence[float], shown: str) -> str:
    """Median, and the range if there are several."""
    if not values:
        return "-"
    middle = format(median(values), shown)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), shown)} .. {format(max(values), shown)})"


def markdown(rows: Iterable[Row]) -> str:
    """For each workload: its stages alone, its runs, and where they lose time."""
    by_workload: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_workload[row["workload"]].append(row)
    parts = []
    for name, found in by_workload.items():
        alone = {r["round"]: r for r in found if r["kind"] == "alone"}
        runs = [r for r in found if r["kind"] == "run" and r["round"] in alone]
        if runs:
            setting = textwrap.fill(f"**{name}**, {_setting(runs, alone)}", WIDTH)
            parts += [setting, _speeds(runs, alone), _losses(runs, alone)]
    return "\n\n".join(parts)


def _setting(runs: Sequence[Row], alone: dict[int, Row]) -> str:
    first = runs[0]
    cores, threads = (" and ".join(sorted({str(r[key]) for r in runs})) for key in ("cores", "threads"))
    each = "; ".join(
        f"{stage} {spread([r['seconds'][stage] for r in alone.values()], '.3f')}" for stage in STAGES
    )
    delay = f"teacher.delay_ms {first['delay_ms']:g}; " if first["delay_ms"] else ""
    lengths = spread([r["response_tokens"] for r in runs], ".0f")
    return (
        f"{cores} cores, {threads} for each stage; {delay}{lengths} response tokens a sample. Seconds a step "
        f"of each stage alone: {each}; bound: {spread([1 / r['bound'] for r in alone.values()], '.2f')} "
        "steps/s."
    )


def _grouped(runs: Iterable[Row]) -> dict[tuple[int, str], list[Row]]:
    found: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in runs:
        found[row["depth"], row["policy"]].append(row)
    return dict(sorted(found.items()))


def _speeds(runs: Sequence[Row], alone: dict[int, Row]) -> str:
    lines = [
        (
            "| max_lag | policy | steps/s | of the bound | at most | of async | mean lag | conductor, of a "
            "core | ms a step |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = _grouped(runs)
    for (depth, policy), found in groups.items():
        asyncs = {r["round"]: r for r in groups.get((depth, "async"), []) if policy != "async"}
        conductor = spread([r["conductor"] for r in found], ".1%")
        at_most = [limit(alone[r["round"]], depth) for r in found]
        of_bound = [alone[r["round"]]["bound"] / r["seconds"] for r in found]
        of_async = [asyncs[r["round"]]["seconds"] / r["seconds"] for r in found if r["round"] in asyncs]
        lines.append(
            f"| {depth} | {policy} | {spread([1 / r['seconds'] for r in found], '.2f')} | "
            f"{spread(of_bound, '.0%')} | {median(at_most):.0%} | {spread(of_async, '.0%')} | "
            f"{median(r['lag_mean'] for r in found):.1f} | {conductor} | "
            f"{1e3 * median(r['conductor'] * r['seconds'] for r in found):.1f} |"
        )
    return "\n".join(lines)


def limit(alone: Row, max_lag: int) -> float:
    """The share of the bound that a schedule can reach which does everything at once: no more than
    `max_lag` + 1 steps are under way, and each goes through all stages.
    """
    return float(alone["bound"] / max(alone["bound"], sum(alone["seconds"].values()) / (max_lag + 1)))


def _losses(runs: Sequence[Row], alone: dict[int, Row]) -> str:
    """Medians over rounds. A step's time is divided into what the slowest stage needs alone, what it takes
    longer for that in a run, its other work, and its idleness: they add up to 1.
    """
    lines = [
        (
            "| max_lag | policy | slowest stage | alone | slower than alone | other work | idle | idle: "
            "sampler, teacher, learner | sampler waits, ms a step: weights, handover, other | learner waits, "
            "ms a step: samples, stragglers, handover |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (depth, policy), found in _grouped(runs).items():
        parts = [split(r, alone[r["round"]]) for r in found]
        stages = "/".join(sorted({stage for stage, _ in parts}))
        shares = " | ".join(
            f"{median(share[part] for _, share in parts):.0%}"
            for part in ("alone", "slower", "other", "idle")
        )
        idle = ", ".join(f"{median(r['shares'][s]['idle'] for r in found):.0%}" for s in STAGES)
        learner = [r["learner_waits"] for r in found if r["learner_waits"] is not None]
        lines.append(
            f"| {depth} | {policy} | {stages} | {shares} | {idle} | "
            f"{_milliseconds([r['sampler_waits'] for r in found])} | {_milliseconds(learner)} |"
        )
    return "\n".join(lines)


def split(run: Row, alone: Row) -> tuple[str, dict[str, float]]:
    """(the slowest stage, shares of a step's time): `alone`, `slower`, `other`, `idle`. A learner's work is
    training and publication.
    """
    stage = max(alone["seconds"], key=alone["seconds"].__getitem__)
    shares = dict(run["shares"][stage])
    idle, main = shares.pop("idle"), shares.pop(STAGES[stage])
    main += shares.pop("publish", 0.0)
    # A step's time as the clock had it, batches from the buffer included.
    seconds = run["seconds"] * (run["steps"] - run["used_up"]) / run["steps"]
    needed = alone["seconds"][stage] / seconds
    return stage, {"alone": needed, "slower": main - needed, "other": sum(shares.values()), "idle": idle}


def _milliseconds(waits: Sequence[dict[str, float]]) -> str:
    if not waits:
        return "-"
    return ", ".join(f"{1e3 * median(w[cause] for w in waits):.0f}" for cause in waits[0])
