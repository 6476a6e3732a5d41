#!/usr/bin/env python3
"""What a lag does to the real pair: `recipes/real-cpu.yaml` at several lags, policies, losses and rates.

    python benchmarks/real_lags.py [--steps 60] [--seeds 0 1] [--at-once 1] [--only NAME ...]
        [--questions recipes/questions.jsonl] [--set KEY=VALUE ...] [--out runs/real-lags]

Each cell is one `fopd run`. Where the lag is exact it does not depend on the clock, so runs may share the
machine (`--at-once`); seconds are not reported. The table gives the held-out KL of each evaluation and the
mean training KL of the last tenth, in nats per token. A cell that has finished is not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SYNC = ("schedule.max_lag=0", "freshness.policy=sync")
CELLS: dict[str, tuple[str, ...]] = {
    "lag 0": SYNC,
    "up to 2, fopd": ("schedule.max_lag=2", "freshness.policy=fopd"),
    "up to 4, fopd": ("schedule.max_lag=4", "freshness.policy=fopd"),
    "exactly 2, fopd": ("schedule.lag=2", "freshness.policy=fopd"),
    "exactly 2, async": ("schedule.lag=2", "freshness.policy=async"),
    "exactly 4, fopd": ("schedule.lag=4", "freshness.policy=fopd"),
    "exactly 4, async": ("schedule.lag=4", "freshness.policy=async"),
    "up to 4, fopd, wait": ("schedule.max_lag=4", "freshness.policy=fopd", "schedule.inflight=wait"),
    "lag 0, fp32": (*SYNC, "learner.dtype=fp32", "sampler.dtype=fp32"),
    "exactly 4, async, fp32": (
        "schedule.lag=4",
        "freshness.policy=async",
        "learner.dtype=fp32",
        "sampler.dtype=fp32",
    ),
    "lag 0, forward KL": (*SYNC, "loss.kind=forward_kl"),
    "exactly 4, async, forward KL": ("schedule.lag=4", "freshness.policy=async", "loss.kind=forward_kl"),
    "exactly 4, fopd, forward KL": ("schedule.lag=4", "freshness.policy=fopd", "loss.kind=forward_kl"),
    "lag 0, JSD": (*SYNC, "loss.kind=jsd"),
    "exactly 4, async, JSD": ("schedule.lag=4", "freshness.policy=async", "loss.kind=jsd"),
    "exactly 4, fopd, JSD": ("schedule.lag=4", "freshness.policy=fopd", "loss.kind=jsd"),
    "lag 0, 3e-5": (*SYNC, "learner.lr=3e-5"),
    "exactly 4, async, 3e-5": ("schedule.lag=4", "freshness.policy=async", "learner.lr=3e-5"),
    "exactly 4, fopd, 3e-5": ("schedule.lag=4", "freshness.policy=fopd", "learner.lr=3e-5"),
}


def run(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The run directory of a cell."""
    folder: Path = args.out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    if (folder / "summary.json").exists():
        return folder
    questions = str(args.questions.resolve())
    keys = [
        *(f"learner.steps={args.steps}", f"eval.every={max(1, args.steps // 6)}", "eval.training=false"),
        *(f"task.train={questions}", f"task.eval={questions}", f"seed={seed}", "checkpoint.every=0"),
        *CELLS[name],
        *args.set,
    ]
    command = [sys.executable, "-m", "fopd_cli", "run", "recipes/real-cpu.yaml", "--run-dir", str(folder)]
    sets = [part for key in keys for part in ("--set", key)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        code = subprocess.run([*command, *sets], stdout=log, stderr=log, cwd=ROOT).returncode
    if code:
        last = (folder.with_suffix(".log").read_text().strip().splitlines() or ["no output"])[-1]
        print(f"{name}, seed {seed}: exit code {code}: {last[:300]}", file=sys.stderr, flush=True)
    return folder


def row(folder: Path) -> dict[str, Any]:
    """What a run's records say: held-out KL by step, the last training KL, lag and drift."""
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [r for r in records if r["kind"] == "step"]
    last = steps[-max(1, len(steps) // 10) :]
    mean = (
        {key: sum(r[key] for r in last) / len(last) for key in ("kl", "lag_mean", "drift_roll")}
        if last
        else {}
    )
    return {
        "held_out": {r["step"]: r["kl"] for r in records if r["kind"] == "eval"},
        "steps": len(steps),
    } | mean


def table(rows: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown, a line per cell and seed."""
    steps = sorted({step for found in rows.values() for step in found["held_out"]})
    lines = [f"| run | seed | {' | '.join(map(str, steps))} | training KL, last tenth | lag | drift |"]
    lines.append("|---" * (len(steps) + 5) + "|")
    for (name, seed), found in rows.items():
        cells = [f"{found['held_out'][s]:.3f}" if s in found["held_out"] else "-" for s in steps]
        ends = [f"{found[key]:.3f}" if key in found else "-" for key in ("kl", "lag_mean", "drift_roll")]
        lines.append(f"| {name} | {seed} | {' | '.join(cells)} | {' | '.join(ends)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--only", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="NAME")
    parser.add_argument("--questions", type=Path, default=ROOT / "recipes" / "questions.jsonl")
    parser.add_argument("--set", action="append", default=[], help="a key of the recipe, for every cell")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "real-lags")
    args = parser.parse_args()
    cells = [(name, seed) for seed in args.seeds for name in args.only]
    with concurrent.futures.ThreadPoolExecutor(args.at_once) as pool:
        folders = list(pool.map(lambda cell: run(*cell, args), cells))
    rows = {cell: row(folder) for cell, folder in zip(cells, folders, strict=True)}
    (args.out / "rows.json").write_text(
        json.dumps([[*cell, found] for cell, found in rows.items()], indent=1)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
