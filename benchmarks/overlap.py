#!/usr/bin/env python3
"""Does asynchrony pay? The same run at max_lag 0 and 2, with a teacher made slow by a configured delay.

    python benchmarks/overlap.py [--steps 30] [--delay-ms 4] [--repeats 3]

Alternates the two and prints wall seconds between the first and the last optimizer step, and the ratio of
each pair. If the teacher works as long as sampler and learner together, the best possible ratio is 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(max_lag: int, steps: int, delay_ms: float, folder: Path) -> float:
    """Wall seconds of steps 2 .. `steps`, as the run itself records them."""
    run = folder / "run"
    settings = [
        f"schedule.max_lag={max_lag}",
        f"learner.steps={steps}",
        f"teacher.delay_ms={delay_ms}",
        "checkpoint.every=0",
    ]
    command = [
        sys.executable,
        "-m",
        "fopd_cli",
        "run",
        str(ROOT / "recipes/quickstart.yaml"),
        "--run-dir",
        str(run),
    ]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    walls = [r["timing"]["wall_seconds"] for r in records if r["kind"] == "step"]
    return float(walls[-1] - walls[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--delay-ms", type=float, default=4.0, help="of the teacher, for each sample")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ratios = []
    for _ in range(args.repeats):
        found = {}
        for max_lag in (0, 2):
            with tempfile.TemporaryDirectory() as folder:
                found[max_lag] = seconds(max_lag, args.steps, args.delay_ms, Path(folder))
        ratios.append(found[0] / found[2])
        print(f"max_lag 0: {found[0]:.2f} s   2: {found[2]:.2f} s   ratio {ratios[-1]:.2f}", flush=True)
    print(
        f"median ratio of {len(ratios)}: {statistics.median(ratios):.2f} (max_lag 0 / max_lag 2; above 1: "
        "asynchrony pays)"
    )


if __name__ == "__main__":
    main()
