#!/usr/bin/env python3
"""What it costs that PyTorch's threads wait for each other by spinning, while other processes are busy.

    python benchmarks/spinning.py [--busy 0 1 2] [--spins 300000 1000 0] [--rounds 3]

Milliseconds of two small operations on two threads, by the number of busy processes beside them and by
`GOMP_SPINCOUNT`; 300,000 is libgomp's default, and 0 is to sleep at once. Each cell is the median of the
rounds, which take turns. See `fopd_cli/runtime/crew/openmp.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict

BUSY = "while True: pass"
MEASURE = """
import json, time, torch
torch.set_num_threads(2)
small, rows, weights = torch.randn(64, 64), torch.randn(16, 576), torch.randn(576, 1536)

def milliseconds(operation, times):
    operation()
    began = time.perf_counter()
    for _ in range(times):
        operation()
    return 1000 * (time.perf_counter() - began) / times

print(json.dumps([milliseconds(lambda: small @ small, 500), milliseconds(lambda: rows @ weights, 200)]))
"""


def measured(spins: int) -> list[float]:
    environment = {**os.environ, "GOMP_SPINCOUNT": str(spins)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, check=True, capture_output=True, text=True
    )
    found: list[float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--spins", type=int, nargs="*", default=[300_000, 1000, 0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| busy processes beside it | spins | 64 x 64 by 64 x 64 | 16 x 576 by 576 x 1536 |")
    print("|---|---|---|---|")
    for count in args.busy:
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        found = defaultdict(list)
        try:
            for _ in range(args.rounds):
                for spins in args.spins:
                    found[spins].append(measured(spins))
        finally:
            for other in others:
                other.kill()
        for spins, times in found.items():
            small, rows = (statistics.median(each) for each in zip(*times, strict=True))
            print(f"| {count} | {spins:,} | {small:.2f} ms | {rows:.2f} ms |", flush=True)


if __name__ == "__main__":
    main()
