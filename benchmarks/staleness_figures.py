"""Figures of benchmarks/staleness.py; needs matplotlib."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

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
# The last is the defaults' anchor at lags over 3. Up to there theirs is constant; "defaults" is always so.
BY_LAG = ("async", "trust", "fopd, top-k anchor", "fopd, defaults", "fopd, pace 64")


def draw(out: Path, results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
    _curves(
        out / "curves.png",
        [r for r in results if r["lag"] in ("0", "8") and not r["extra"] and r["optimizer"] == "adamw"],
    )
    _lags(
        out / "lags.png",
        [r for r in rows if r["task"] == "short" and not r["overrides"] and r["optimizer"] == "adamw"],
    )
    _sensitivity(
        out / "sensitivity.png",
        [
            r
            for r in rows
            if (r["task"], r["loss"], r["lag"]) == ("short", "pg_cached", "8")
            and "learner.lr=" not in r["overrides"]  # those are the map's
        ],
    )


def _curves(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Held-out score by optimizer step at lag 8, cached policy gradient, one panel per task."""
    tasks = [t for t in ("short", "middle", "long") if any(r["task"] == t for r in results)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for task, panel in zip(tasks, panels[0], strict=True):
        for number, policy in enumerate(SHOWN):
            runs = [
                r["curve"]
                for r in results
                if (r["task"], r["loss"], r["policy"]) == (task, "pg_cached", policy)
            ]
            if runs:
                steps = [step for step, _ in runs[0]]
                means = [statistics.fmean(run[i][1] for run in runs) for i in range(len(steps))]
                panel.plot(
                    steps,
                    means,
                    label=policy,
                    color=f"C{number}",
                    linestyle="--" if policy == "sync" else "-",
                )
        panel.set(title=task, xlabel="optimizer step", ylabel="held-out score", ylim=(0, None))
    panels[0][0].legend(fontsize=7)
    _save(figure, path)


def _lags(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Final score by lag, one panel per loss."""
    losses = list(dict.fromkeys(r["loss"] for r in rows))
    figure, panels = plt.subplots(1, len(losses), figsize=(2 * len(losses), 3.2), squeeze=False, sharey=True)
    for loss, panel in zip(losses, panels[0], strict=True):
        points: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for r in rows:
            if r["loss"] == loss and r["lag"].isdigit() and r["policy"] in BY_LAG:
                points[r["policy"]].append((int(r["lag"]), r["score"], r["error"]))
        for r in rows:
            if r["loss"] == loss and r["policy"] == "sync":
                panel.axhline(r["score"], color="grey", linestyle="--", label="sync")
        for policy, values in sorted(points.items()):
            x, y, e = zip(*sorted(values), strict=True)
            colour = f"C{BY_LAG.index(policy)}"
            panel.errorbar(x, y, yerr=e, label=policy, marker="o", capsize=2, color=colour)
        panel.set(title=loss, xlabel="lag", ylim=(-0.02, 1.02))
    panels[0][0].set_ylabel("final held-out score")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    _save(figure, path, below=0.07)


def _sensitivity(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Final score of each variant of the sweep, beside the unchanged policy."""
    shown = [r for r in rows if r["overrides"] and r["optimizer"] == "adamw"]
    shown += [
        r
        for r in rows
        if not r["overrides"] and r["policy"] in ("sync", "async", "trust", "fopd, top-k anchor")
    ]
    if not shown:
        return
    names = [
        f"{r['policy']}: {r['overrides'].replace('freshness.', '')}" if r["overrides"] else r["policy"]
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
    _save(figure, path)


def _save(figure: Any, path: Path, below: float = 0.0) -> None:
    """`below`: the share of the height that is left for a legend."""
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
