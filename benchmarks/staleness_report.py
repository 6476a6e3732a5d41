"""Results of benchmarks/staleness.py as tables and figures."""

from __future__ import annotations

import csv
import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import staleness_regions as regions

Result = dict[str, Any]
ASYNC_LAG = "8"
MAPS = tuple((task, loss) for loss in ("pg_cached", "reverse_kl") for task in ("short", "long"))
TEXT = "text"  # judged by its KL, in a table of its own


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One for each (task, loss, policy, lag, overrides): means over seeds, beside the synchronous run of the
    same task and loss.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in (r for r in results if r["task"] != TEXT):
        groups[r["task"], r["loss"], r["lag"], r["policy"], tuple(r["extra"]), r["optimizer"]].append(r)
    found = []
    for (task, loss, lag, policy, extra, optimizer), runs in groups.items():
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
                "overrides": " ".join(extra),
                "optimizer": optimizer,
                **_figures(runs, sync),
            }
        )
    return found


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


def text_markdown(results: Sequence[Result]) -> str:
    """The runs on the real pair: held-out KL to the teacher (nats per token), and the share of the
    synchronous run's gain; nothing if there are none.
    """
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in (r for r in results if r["task"] == TEXT):
        groups[r["loss"], tuple(r["extra"]), r["lag"], r["policy"]].append(r)
    if not groups:
        return ""
    lines = [
        "| loss | lag | policy | seeds | KL at first | KL at last | lowest | of sync's gain | "
        "KL on the teacher's answers | D_roll | mean lag |",
        "|---" * 11 + "|",
    ]
    for (loss, extra, lag, policy), runs in sorted(groups.items(), key=lambda group: str(group[0])):
        base = groups.get((loss, extra, "0", "sync"), [])
        first, last = (statistics.fmean(r["kl_curve"][at][1] for r in runs) for at in (0, -1))
        end = statistics.fmean(r["kl"] for r in base) if base else float("nan")
        error = statistics.stdev(r["kl"] for r in runs) / len(runs) ** 0.5 if len(runs) > 1 else float("nan")
        lowest = statistics.fmean(min(kl for _, kl in r["kl_curve"]) for r in runs)
        drift, mean_lag = (statistics.fmean(r[key] for r in runs) for key in ("drift_roll", "lag_mean"))
        name = " ".join([policy, *extra])
        kl = f"{first:.3f} | {last:.3f} ± {error:.3f} | {lowest:.3f} | {(first - last) / (first - end):.0%}"
        known = [r["kl_on_answers"] for r in runs if r.get("kl_on_answers") is not None]
        answers = f"{statistics.fmean(known):.3f}" if known else "-"
        lines.append(
            f"| {loss} | {lag} | {name} | {len(runs)} | {kl} | {answers} | {drift:.3f} | {mean_lag:.1f} |"
        )
    return "\n".join(lines).replace("nan%", "-").replace("nan", "-")


def markdown(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            "| task | loss | lag | policy | score | of sync | of its gain | KL | peak - final | collapsed | "
            "steps to 90% | throughput |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        name = " ".join(
            filter(None, [r["policy"], r["overrides"], "" if r["optimizer"] == "adamw" else r["optimizer"]])
        )
        lines.append(
            f"| {r['task']} | {r['loss']} | {r['lag']} | {name} | {r['score']:.3f} ± {r['error']:.3f} | "
            f"{r['of_sync']:.0%} | {r['of_gain']:.0%} | {r['kl']:.3f} | {r['drop']:.3f} | "
            f"{r['collapsed']}/{r['seeds']} | {r['steps_to_90']:.0f} | {r['throughput']:.2f} |"
        )
    return "\n".join(lines).replace("nan%", "-").replace("nan", "-").replace("inf", "never")


def write(out: Path, results: Sequence[Result]) -> None:
    """table.csv, table.md and the figures."""
    found = rows(results)
    if text := text_markdown(results):
        (out / "text.md").write_text(text + "\n")
    if not found:
        return
    with (out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (out / "table.md").write_text(markdown(found) + "\n")
    maps = {name: regions.places(found, *name) for name in MAPS}
    maps = {name: map_ for name, map_ in maps.items() if len({p.rate for p in map_}) > 1}
    if maps:
        pages = [f"**{task}, {loss}**\n\n{regions.markdown(m)}\n" for (task, loss), m in maps.items()]
        (out / "regions.md").write_text("\n".join(pages))
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: matplotlib is not installed (pip install 'fopd[bench]')")
        return
    from staleness_figures import draw

    draw(out, results, found)
    if maps:
        regions.draw(out, {f"{task}, {loss}": map_ for (task, loss), map_ in maps.items()})
