#!/usr/bin/env python3
"""Does freshness control pay, where, and how much? The paper's tables at a scale that two CPU cores can run.

    python benchmarks/staleness.py [--quick | --full] [--out docs/staleness] [--jobs 2]

Every cell is a whole run of ours (`inline.py`) on a tiny pair, with an exact lag or with lags that mix; cells that stand in
OUT/results.jsonl are not run again. Writes table.csv and table.md, prints the headline table last. A beginning: no full grid was run yet.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

TASKS: dict[str, tuple[str, list[str]]] = {  # recipe, overrides
    "short": ("quickstart.yaml", ["task.eval_prompts=128", "task.horizon=5", "learner.steps=120", "eval.every=12"]),
    "middle": ("tool-tiny.yaml", ["task.eval_prompts=64", "task.drift=0.1", "learner.steps=40", "eval.every=8"]),
}
LOSSES: dict[str, list[str]] = {
    "pg_cached": ["loss.support=sampled", "loss.advantage=cached"],
    "pg_ratio": ["loss.support=sampled", "loss.advantage=cached", "loss.importance=true"],
    "pg_recomputed": ["loss.support=sampled", "loss.advantage=recomputed"],
    "reverse_kl": ["loss.kind=reverse_kl", "loss.support=full"],
    "forward_kl": ["loss.kind=forward_kl", "loss.support=full"],
    "jsd": ["loss.kind=jsd", "loss.support=full"],
    "topk": ["loss.support=topk", "teacher.k=8"],
}
POLICIES: dict[str, list[str]] = {
    **{
        name: [f"freshness.policy={name}"]
        for name in ("async", "fixed_refresh", "lag_weight", "reweight", "reweight+anchor", "fopd")
    },
    "reweight, scaled step": ["freshness.policy=reweight", "freshness.step_scale=freshness"],
    "ratio, capped": ["freshness.policy=async", "loss.importance=true", "loss.max_ratio=2"],
}
COMMON = [
    "sampler.concurrency=64", "checkpoint.every=0", "schedule.inflight=wait", "freshness.xi=0.01", "freshness.refresh.every_at_least=50",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run. `lag` exact; policy `sync` is lag 0 without control."""

    task: str
    loss: str
    policy: str
    lag: int
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, asdict(self).values()))

    @property
    def overrides(self) -> list[str]:
        policy = ["freshness.policy=sync"] if self.policy == "sync" else POLICIES[self.policy]
        return [
            *TASKS[self.task][1],
            *COMMON,
            *LOSSES[self.loss],
            *policy,
            f"schedule.lag={self.lag}",
            f"seed={self.seed}",
        ]


def cells(full: bool) -> Iterator[Cell]:
    """The grid, headline rows first."""
    for seed in range(3):
        yield Cell("short", "pg_cached", "sync", 0, seed)
        for policy in ("async", "fixed_refresh", "lag_weight", "reweight", "reweight+anchor", "fopd"):
            yield Cell("short", "pg_cached", policy, 8, seed)
    if not full:
        return
    for seed in range(5):
        for task in TASKS:
            for loss in LOSSES:
                yield Cell(task, loss, "sync", 0, seed)
                for lag in (2, 4, 8, 16):
                    for policy in POLICIES:
                        if policy != "ratio, capped" or loss.startswith("pg"):
                            yield Cell(task, loss, policy, lag, seed)


def measure(cell: Cell, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run one cell."""
    import torch
    from inline import Inline

    from fopd_cli.collapse import collapse
    from fopd_cli.recipe import load_recipe

    torch.set_num_threads(1)
    began = time.monotonic()
    recipe = load_recipe(ROOT / "recipes" / TASKS[cell.task][0], [*cell.overrides, *extra])
    outcome = Inline(recipe).run()
    curve = [(int(e["step"]), float(e["score"])) for e in outcome.evaluations]
    found = collapse(curve, recipe.learner.steps)
    return {
        **asdict(cell), "key": cell.key, "score": curve[-1][1], "peak": found.peak, "drop": found.drop, "collapsed": found.collapsed,
        "curve": curve, "kl": outcome.evaluations[-1]["kl"], "lag_mean": statistics.fmean(s["lag_mean"] for s in outcome.steps),
        "freshness": statistics.fmean(s["freshness"] for s in outcome.steps),
        "drift_roll": statistics.fmean(s["drift_roll"] for s in outcome.steps),
        "drift_sup": statistics.fmean(s["drift_sup"] for s in outcome.steps), "refreshes": outcome.refreshes,
        "modelled_seconds": outcome.seconds, "wall_seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each (task, loss, policy, lag): mean over seeds, its standard error, collapses."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for r in results:
        groups[r["task"], r["loss"], r["policy"], r["lag"]].append(r)
    rows = []
    for (task, loss, policy, lag), runs in groups.items():
        scores = [r["score"] for r in runs]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        rows.append(
            {
                "task": task, "loss": loss, "policy": policy, "lag": lag, "seeds": len(runs), "score": statistics.fmean(scores),
                "error": error, "collapsed": sum(r["collapsed"] for r in runs), "drop": statistics.fmean(r["drop"] for r in runs),
                "freshness": statistics.fmean(r["freshness"] for r in runs), "drift_roll": statistics.fmean(r["drift_roll"] for r in runs),
                "drift_sup": statistics.fmean(r["drift_sup"] for r in runs), "refreshes": statistics.fmean(r["refreshes"] for r in runs),
            }
        )  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | loss | lag | policy | score | peak - final | collapsed | freshness | D_roll |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['task']} | {r['loss']} | {r['lag']} | {r['policy']} | {r['score']:.3f} ± {r['error']:.3f} | {r['drop']:.3f} | "
            f"{r['collapsed']}/{r['seeds']} | {r['freshness']:.3f} | {r['drift_roll']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the headline rows, three seeds (the default)")
    parser.add_argument("--full", action="store_true", help="everything, five seeds: hours")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "staleness")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    results = {r["key"]: r for r in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    wanted = list(dict.fromkeys(cells(args.full)))
    todo = [cell for cell in wanted if cell.key not in results]
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=8) as pool, path.open("a") as file:
        for number, result in enumerate(pool.imap_unordered(measure, todo), 1):
            results[result["key"]] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(
                f"{number}/{len(todo)}  {result['key']}: {result['score']:.3f} in {result['wall_seconds']} s",
                flush=True,
            )
    rows = table([results[cell.key] for cell in wanted])
    with (args.out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "table.md").write_text(markdown(rows) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
