"""How PyTorch's OpenMP threads wait for each other, on a machine that does other work, too.

By default they spin 300,000 times before they sleep. Where another process wants one of their cores, they
spin away the time in which the thread that they wait for could run: on two cores with two busy processes
beside it, a product of 64 x 64 takes 16 ms on two threads. With 1,000 spins it takes 0.05 ms, and no longer
than by default where nothing else runs (benchmarks/spinning.py).

Roles that share a CPU can be such processes to each other; so can a second run.
"""

from __future__ import annotations

import os

SPINS = "1000"


def spin_briefly() -> None:
    """For this process and all that it starts; before torch is imported. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
