#!/usr/bin/env python3
"""Is a plan right? Real runs on a CPU against what `fopd plan --from` says of them, calibrated by the first.

    python benchmarks/plan.py [--steps 30] [--repeats 3] [--only NAME ...]

The tiny pair, one thread for each role, and a teacher made slow by a configured delay. Throughput is response
tokens per second between the steps in which a run is in its stride: without the first ones, in which the
pipeline fills, and the last ones, in which nothing new is sampled. The plan is told the lengths of the
calibrating run, or, where lengths are another setting's, those of the run itself. Measured is the fastest of
the repeats: whatever else the machine does can only slow a run down.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
COMMON = (
    "placement.threads={sampler: 1, teacher: 1, learner: 1}",
    "freshness.max_drift=null",
    "learner.lr=1.0e-6",  # lengths stay what they are
    "task.eval_prompts=16",
    "checkpoint.every=0",
    "track=[]",
)
FILLS = 3  # steps, and as many as the largest lag
UNEVEN = ("sampler.temperature=2.0", "sampler.max_new_tokens=160")


@dataclass(frozen=True)
class Cell:
    """A run. `own`: the plan is told the run's own lengths."""

    name: str
    lag: int
    settings: tuple[str, ...]
    own: bool = False


def cells(key: str) -> list[Cell]:
    """The first one calibrates the plan of all. `key` sets the largest lag."""
    slow, quick = "teacher.delay_ms=4", "teacher.delay_ms=0"
    found = [
        Cell("slow teacher, lag 2", 2, (slow,)),
        Cell("slow teacher, lag 0", 0, (slow,)),
        Cell("slow teacher, lag 1", 1, (slow,)),
        Cell("slow teacher, lag 4", 4, (slow,)),
        Cell("quick teacher, lag 2", 2, (quick,)),
        Cell("quick teacher, lag 0", 0, (quick,)),
        Cell("batches of 32, lag 1", 1, (slow, "learner.batch_samples=32", "sampler.concurrency=32")),
        Cell("16 at once, lag 2", 2, (quick, "sampler.concurrency=16")),
        Cell("weights in mid-rollout, lag 2", 2, (quick, "sampler.concurrency=16", "schedule.inflight=keep")),
        Cell("uneven lengths, lag 0", 0, ("teacher.delay_ms=1", *UNEVEN), own=True),
        Cell("uneven lengths, lag 2", 2, ("teacher.delay_ms=1", *UNEVEN), own=True),
    ]
    return [Cell(c.name, c.lag, (f"schedule.{key}={c.lag}", *c.settings), c.own) for c in found]


def ran(cell: Cell, steps: int, run: Path) -> float:
    """Response tokens per second of a real run."""
    settings = [*COMMON, f"learner.steps={steps}", *cell.settings]
    command = [sys.executable, "-m", "fopd_cli", "run", str(RECIPE), "--run-dir", str(run)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steady = [r for r in records if r["kind"] == "step"][cell.lag + FILLS : steps - cell.lag]
    seconds = steady[-1]["timing"]["wall_seconds"] - steady[0]["timing"]["wall_seconds"]
    samples = 32 if any("batch_samples=32" in s for s in cell.settings) else 64
    return float(samples * sum(r["response_length"] for r in steady[1:]) / seconds)


def planned(cell: Cell, steps: int, calibrating: Path, run: Path) -> float:
    """The same, as the plan has it."""
    from fopd_cli.plan.command import plan
    from fopd_cli.recipe import load_recipe

    recipe = load_recipe(RECIPE, [*COMMON, f"learner.steps={steps}", *cell.settings])
    found, _ = plan(recipe, lengths=str(run) if cell.own else None, run=calibrating)
    return found.outcome.tokens_per_second


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="cells whose names contain one of these, and the first")
    parser.add_argument(
        "--keep", type=Path, help="keep the runs there; those that are there are not done again"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from fopd_cli.plan.lags import LAG_KEY

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        chosen = cells(LAG_KEY)
        chosen = [c for c in chosen if not args.only or c == chosen[0] or any(w in c.name for w in args.only)]
        print("| run | measured, tokens/s | repeats | planned | off |\n|---|---|---|---|---|")
        for cell in chosen:
            names = [f"{cell.name.replace(' ', '-').replace(',', '')}-{i}" for i in range(args.repeats)]
            found = [measured(cell, args.steps, folder / name) for name in names]
            most = max(found)
            fastest = folder / names[found.index(most)]
            if cell is chosen[0]:
                calibrating = fastest
            said = planned(cell, args.steps, calibrating, fastest)
            repeats = ", ".join(f"{value:,.0f}" for value in found)
            print(f"| {cell.name} | {most:,.0f} | {repeats} | {said:,.0f} | {said / most - 1:+.0%} |")
            sys.stdout.flush()


def measured(cell: Cell, steps: int, run: Path) -> float:
    """Of a run that is done already, or is done now."""
    note = run.with_suffix(".tokens-per-second")
    if not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(ran(cell, steps, run)))
    return float(note.read_text())


if __name__ == "__main__":
    main()
