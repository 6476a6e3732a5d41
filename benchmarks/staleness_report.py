"""Results of benchmarks/staleness.py on toys: as rows, one for each setting, and as files."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import staleness_regions as regions
from staleness_names import LOSSES, full_label, longest, rank
from staleness_text_report import TEXT

Result = dict[str, Any]
Row = dict[str, Any]
ASYNC_LAG = "8"
TASKS = ("short", "middle", "long")
MAPS = tuple((task, loss) for loss in ("pg_cached", "reverse_kl") for task in ("short", "long"))


def read(path: Path) -> list[Result]:
    """The committed runs, the last of each key; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({r["key"]: r for r in map(json.loads, lines)}.values())


def rows(results: Sequence[Result]) -> list[Row]:
    """One for each (task, loss, policy, lag, overrides): means over seeds, beside the synchronous run of the
    same task and loss. Their order does not depend on that of the runs.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in (r for r in results if r["task"] != TEXT):
        groups[r["task"], r["loss"], r["lag"], r["policy"], tuple(r["extra"]), r["optimizer"]].append(r)
    found = []
    for group in sorted(groups, key=_place):
        task, loss, lag, policy, extra, optimizer = group
        # The synchronous run of the same world: the one with the most of these overrides.
        bases = [
            groups.get((task, loss, "0", "sync", extra[:n], optimizer)) for n in range(len(extra), -1, -1)
        ]
        sync = next((base for base in bases if base), [])
        found.append(
            {
                "study": _study(loss, lag, extra, optimizer, task),
                "task": task,
                "loss": loss,
                "lag": lag,
                "policy": policy,
                "name": full_label(policy, loss, lag, extra, optimizer),
                "overrides": " ".join(extra),
                "optimizer": optimizer,
                **_figures(groups[group], sync),
            }
        )
    return found


def _place(group: tuple[Any, ...]) -> tuple[Any, ...]:
    task, loss, lag, policy, extra, optimizer = group
    known = (*TASKS, *LOSSES)
    of_task, of_loss = (known.index(name) if name in known else len(known) for name in (task, loss))
    return of_task, task, of_loss, loss, optimizer, extra, longest(lag), lag, rank(policy)


def _study(loss: str, lag: str, extra: Sequence[str], optimizer: str, task: str) -> str:
    headline = (
        task == "short"
        and loss == "pg_cached"
        and lag in ("0", ASYNC_LAG)
        and not extra
        and optimizer == "adamw"
    )
    return "headline" if headline else ""


def _figures(runs: list[Result], sync: list[Result]) -> dict[str, Any]:
    scores = [r["score"] for r in runs]
    mean = statistics.fmean(scores)
    base = statistics.fmean(r["score"] for r in sync) if sync else float("nan")
    start = statistics.fmean(r["curve"][0][1] for r in runs)
    pace = statistics.fmean(r["modelled_seconds"] for r in sync) if sync else float("nan")
    reached = [_first(r["curve"], 0.9 * base) for r in runs]
    return {
        "seeds": len(runs),
        "score": mean,
        "error": statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan"),
        "of_sync": mean / base if base else float("nan"),
        "of_gain": (mean - start) / (base - start) if base > start else float("nan"),
        "kl": statistics.fmean(r["kl"] for r in runs),
        "drop": statistics.fmean(r["drop"] for r in runs),
        "collapsed": sum(r["collapsed"] for r in runs),
        # The median over seeds, if most of them get there.
        "steps_to_90": statistics.median(s if s is not None else float("inf") for s in reached),
        "throughput": pace / statistics.fmean(r["modelled_seconds"] for r in runs),
        "freshness": statistics.fmean(r["freshness"] for r in runs),
        "lag_mean": statistics.fmean(r["lag_mean"] for r in runs),
        "drift_roll": statistics.fmean(r["drift_roll"] for r in runs),
        "drift_sup": statistics.fmean(r["drift_sup"] for r in runs),
        "refreshes": statistics.fmean(r["refreshes"] for r in runs),
    }


def _first(curve: list[list[float]], target: float) -> float | None:
    return next((step for step, score in curve if score >= target), None)


def equal_time(results: Sequence[Result]) -> list[tuple[str, float, float]]:
    """(policy, steps done, score) of the headline at the moment when the asynchronous run has ended, by the
    cost model.
    """
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    main = [
        r for r in results if _study(r["loss"], r["lag"], r["extra"], r["optimizer"], r["task"]) == "headline"
    ]
    budget = statistics.fmean(r["modelled_seconds"] for r in main if r["policy"] == "async")
    for r in main:
        last = r["curve"][-1][0]
        steps = min(last, last * budget / r["modelled_seconds"])
        found[r["policy"]].append((steps, _at(r["curve"], steps)))
    return [(p, *(statistics.fmean(column) for column in zip(*v, strict=True))) for p, v in found.items()]  # type: ignore[misc]


def _at(curve: list[list[float]], step: float) -> float:
    for (a, low), (b, high) in pairwise(curve):
        if a <= step <= b:
            return low + (high - low) * (step - a) / (b - a)
    return curve[-1][1]


def markdown(found: Sequence[Row]) -> str:
    lines = [
        (
            "| task | loss | lag | policy | score | of sync | of its gain | KL | peak - final | collapsed | "
            "steps to 90% | throughput |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        lines.append(
            f"| {r['task']} | {r['loss']} | {r['lag']} | {r['name']} | {r['score']:.3f} ± {r['error']:.3f} | "
            f"{r['of_sync']:.0%} | {r['of_gain']:.0%} | {r['kl']:.3f} | {r['drop']:.3f} | "
            f"{r['collapsed']}/{r['seeds']} | {r['steps_to_90']:.0f} | {r['throughput']:.2f} |"
        )
    return "\n".join(lines).replace("nan%", "-").replace("nan", "-").replace("inf", "never")


def maps(found: Sequence[Row]) -> dict[tuple[str, str], list[regions.Place]]:
    """The maps with more than one learning rate, by (task, loss)."""
    drawn = {name: regions.places(found, *name) for name in MAPS}
    return {name: places for name, places in drawn.items() if len({p.rate for p in places}) > 1}


def files(results: Sequence[Result]) -> dict[str, str]:
    """What `rows` give, by the name of a file: every row as CSV and as a table, and the maps."""
    found = rows(results)
    if not found:
        return {}
    table = io.StringIO()
    writer = csv.DictWriter(table, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in r.items()} for r in found)
    texts = {"table.csv": table.getvalue(), "table.md": markdown(found) + "\n"}
    if drawn := maps(found):
        parts = [
            f"**{task} task, {LOSSES[loss]}**\n\n{regions.markdown(m)}\n" for (task, loss), m in drawn.items()
        ]
        texts["regions.md"] = "\n".join(parts)
    return texts


def write(out: Path, results: Sequence[Result]) -> None:
    """These files into a folder."""
    for name, text in files(results).items():
        (out / name).write_text(text, encoding="utf-8")
