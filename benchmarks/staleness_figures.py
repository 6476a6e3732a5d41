"""Figures of benchmarks/staleness.py; needs matplotlib."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import staleness_regions as regions
import staleness_report as report
from staleness_names import LOSSES, ON_TEXT, PUBLISHED, WEAKENING, full_label, label, longest
from staleness_text_report import TextRow, text_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = (
    "sync",
    "async",
    "lag_weight",
    "reweight",
    "fopd",
    "trust",
    "fopd, quadratic anchor",
    "fopd, top-k anchor",
    "fopd, pace 64",
)
BY_LAG = ("async", "trust", "fopd, top-k anchor", "fopd, defaults", "fopd, pace 64")
BASES = ("trust", "fopd, top-k anchor")  # of the sweep
OF_LEGEND = {"fopd, defaults": "lambda 20 (exact losses: defaults, no anchor)"}


def draw(out: Path, results: Sequence[dict[str, Any]], metadata: dict[str, str]) -> None:
    """All figures that these runs are enough for. `metadata` goes into the files."""
    rows = report.rows(results)
    if rows:
        _curves(
            out / "curves.png",
            [r for r in results if r["lag"] in ("0", "8") and not r["extra"] and r["optimizer"] == "adamw"],
            metadata,
        )
        _lags(
            out / "lags.png",
            [r for r in rows if r["task"] == "short" and not r["overrides"] and r["optimizer"] == "adamw"],
            metadata,
        )
        _sensitivity(
            out / "sensitivity.png",
            [
                r
                for r in rows
                if (r["task"], r["loss"], r["lag"]) == ("short", "pg_cached", "8")
                and "learner.lr=" not in r["overrides"]  # those are the map's
            ],
            metadata,
        )
    if maps := report.maps(rows):
        regions.draw(out / "regions.png", maps, metadata)
    if text := text_rows(results):
        _text(out / "text.png", text, metadata)


def _curves(path: Path, results: Sequence[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Held-out score by optimizer step at lag 8, cached policy gradient, one panel per task."""
    loss = "pg_cached"
    shown = [r for r in results if r["loss"] == loss and r["policy"] in SHOWN]
    tasks = [t for t in report.TASKS if any(r["task"] == t for r in shown)]
    if not tasks:
        return
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 4.2), squeeze=False)
    handles: dict[str, Any] = {}
    for task, panel in zip(tasks, panels[0], strict=True):
        for number, policy in enumerate(SHOWN):
            runs = [r["curve"] for r in shown if (r["task"], r["policy"]) == (task, policy)]
            if runs:
                steps = [step for step, _ in runs[0]]
                means = [statistics.fmean(run[i][1] for run in runs) for i in range(len(steps))]
                name = label(policy, loss, "8")
                style = "--" if policy == "sync" else "-"
                width = 2.5 if policy in ("sync", WEAKENING) else 1.5
                (handles[name],) = panel.plot(
                    steps, means, color=f"C{number}", linestyle=style, linewidth=width
                )
        panel.set(title=f"{task} task", xlabel="optimizer step", ylim=(0, None))
    panels[0][0].set_ylabel("held-out score, mean over seeds")
    figure.suptitle("Lag 8, cached policy gradient", fontsize=11)
    figure.legend(handles.values(), handles, loc="lower center", ncol=5, fontsize=8, frameon=False)
    _save(figure, path, metadata, below=0.1)


def _lags(path: Path, rows: Sequence[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Final score by lag, one panel per loss."""
    losses = list(dict.fromkeys(r["loss"] for r in rows))
    if not losses:
        return
    figure, panels = plt.subplots(1, len(losses), figsize=(2 * len(losses), 3.2), squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for loss, panel in zip(losses, panels[0], strict=True):
        points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for r in rows:
            if r["loss"] == loss and r["lag"].isdigit() and r["policy"] in BY_LAG:
                points[r["policy"]].append((int(r["lag"]), r["score"], r["error"]))
        for r in rows:
            if r["loss"] == loss and r["policy"] == "sync":
                handles["sync"] = panel.axhline(r["score"], color="grey", linestyle="--")
        for policy, values in sorted(points.items(), key=lambda item: BY_LAG.index(item[0])):
            x, y, e = zip(*sorted(values), strict=True)
            colour = f"C{BY_LAG.index(policy)}"
            name = OF_LEGEND.get(policy, label(policy, loss, "8"))
            handles[name] = panel.errorbar(x, y, yerr=e, marker="o", capsize=2, color=colour)
        panel.set_title(LOSSES.get(loss, loss).replace(", ", ",\n"), fontsize=9)
        panel.set(xlabel="lag", ylim=(-0.02, 1.02))
    panels[0][0].set_ylabel("final held-out score")
    figure.legend(handles.values(), handles, loc="lower center", ncol=6, fontsize=8, frameon=False)
    _save(figure, path, metadata, below=0.07)


def _sensitivity(path: Path, rows: Sequence[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Final score of each variant of the sweep, beside the unchanged policy."""
    shown = [r for r in rows if r["overrides"] and r["policy"] != PUBLISHED and r["optimizer"] == "adamw"]
    shown += [r for r in rows if not r["overrides"] and r["policy"] in ("async", *BASES)]
    if not shown:
        return
    names = [
        r["overrides"].replace("freshness.", "") if r["overrides"] and r["policy"] in BASES else r["name"]
        for r in shown
    ]
    figure, panel = plt.subplots(figsize=(8, 0.25 * len(shown) + 1))
    panel.barh(
        names,
        [r["score"] for r in shown],
        xerr=[r["error"] for r in shown],
        color=["C0" if r["overrides"] else "C1" for r in shown],
    )
    panel.tick_params(axis="y", labelsize=7)
    panel.set(xlabel="final held-out score, short task, cached policy gradient, lag 8")
    _save(figure, path, metadata)


def _text(path: Path, rows: Sequence[TextRow], metadata: dict[str, str]) -> None:
    """KL at the end on real text: above on the student's own answers, below on the teacher's, one panel per
    loss and a bar per policy and lag; the synchronous run's seeds are a band.
    """
    rows = [r for r in rows if not r.extra]
    losses = list(dict.fromkeys(r.loss for r in rows))
    if not losses:
        return
    measured = any(r.on_answers is not None for r in rows)
    widths = [max(2, sum(r.loss == loss and r.policy != "sync" for r in rows)) for loss in losses]
    figure, panels = plt.subplots(
        1 + measured,
        len(losses),
        figsize=(max(8, 2.2 + 0.62 * sum(widths)), 3.4 + 2.6 * measured),
        width_ratios=widths,
        squeeze=False,
        sharex="col",
    )
    for column, loss in enumerate(losses):
        sync = [r for r in rows if r.loss == loss and r.policy == "sync"]
        own = [r for r in rows if r.loss == loss and r.policy != "sync"]
        room = (max(2, len(own)) - len(own)) / 2  # a single bar stands in the middle
        panels[0][column].set_xlim(-0.7 - room, len(own) - 0.3 + room)
        _bars(panels[0][column], sync, own, "kl")
        panels[0][column].set_title(ON_TEXT.get(loss, loss).replace(", ", ",\n"), fontsize=9)
        if measured:
            _bars(panels[1][column], sync, own, "kl_on_answers")
        panels[-1][column].set_xticks(range(len(own)))
        panels[-1][column].set_xticklabels(
            [_short(r) for r in own], rotation=60, ha="right", rotation_mode="anchor", fontsize=7
        )
    panels[0][0].set_ylabel("KL on its own answers,\nnats a token", fontsize=8)
    if measured:
        panels[1][0].set_ylabel("KL(teacher || student) on\nthe teacher's, nats a token", fontsize=8)
    figure.suptitle(
        "Real pair, at the end of training: lower is better, and only bars of one panel compare.\n"
        "Grey: the synchronous run, a line if it has one seed, a band over several. Orange: async. "
        "Dots: seeds. Hatched: collapsed",
        fontsize=9,
    )
    _save(figure, path, metadata)


def _bars(panel: Any, sync: Sequence[TextRow], rows: Sequence[TextRow], key: str) -> None:
    """One measure of one loss. A collapsed run is hatched, and where it ends beyond the panel, cut off with
    its value written on it.
    """

    def known(row: TextRow) -> list[float]:
        return [r[key] for r in row.runs if r.get(key) is not None]

    values, seeds = [known(row) for row in rows], [v for row in sync for v in known(row)]
    if seeds:
        panel.axhspan(min(seeds), max(seeds), color="black", alpha=0.35, linewidth=1, zorder=3)
    healthy = [v for row, found in zip(rows, values, strict=True) if not row.collapsed for v in found]
    top = 1.25 * max([*healthy, *seeds], default=1.0)
    for place, (row, found) in enumerate(zip(rows, values, strict=True)):
        if not found:
            continue
        mean = statistics.fmean(found)
        colour = "C1" if row.policy == "async" else "C0"
        panel.bar(place, mean, color=colour, hatch="///" if row.collapsed else None, edgecolor="white")
        panel.plot([place] * len(found), found, "k.", markersize=4, zorder=4)
        if mean > top:
            panel.text(place, 0.9 * top, f"{mean:.1f}", ha="center", fontsize=7, fontweight="bold")
    panel.set_ylim(0, top)
    panel.tick_params(axis="y", labelsize=7)


def _short(row: TextRow) -> str:
    name = full_label(row.policy, row.loss, row.lag, row.extra)
    return f"{name}, lag {'≤ ' if not row.lag.isdigit() else ''}{longest(row.lag)}"


def _save(figure: Any, path: Path, metadata: dict[str, str], below: float = 0.0) -> None:
    """`below`: the share of the height that is left for a legend."""
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)
