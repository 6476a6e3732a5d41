"""How many threads each role gets while others compute, too."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from fopd_cli.runtime.crew import cores
from fopd_cli.runtime.crew.cores import Cores


def test_cores_are_divided_among_those_who_compute() -> None:
    busy = cores.table()
    workers = [Cores(busy, row, total=8) for row in range(3)]
    workers[1].compute()
    assert torch.get_num_threads() == 8
    workers[0].compute()
    assert [w.due() for w in workers[:2]] == [4, 4]
    workers[2].compute()
    assert [w.due() for w in workers] == [3, 3, 2]
    workers[0].rest()
    workers[1].share()
    assert torch.get_num_threads() == 4


def test_everyone_keeps_one_thread() -> None:
    busy = cores.table()
    workers = [Cores(busy, row, total=2) for row in range(5)]
    for worker in workers:
        worker.compute()
    assert [w.due() for w in workers] == [1, 1, 1, 1, 1]


def test_others_may_write_while_it_is_read() -> None:
    """As many threads as rows were busy at some moment, whatever the others do in the meantime."""
    busy = cores.table()
    mine, done = Cores(busy, 0, total=8), threading.Event()
    mine.compute()

    def others() -> None:
        while not done.is_set():
            busy[1:] = torch.randint(0, 2, (len(busy) - 1,), dtype=torch.int32)

    writer = threading.Thread(target=others)
    writer.start()
    try:
        assert all(1 <= mine.due() <= 8 for _ in range(2000))
    finally:
        done.set()
        writer.join()


@pytest.mark.parametrize(
    ("users", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["by default", "the user's spins", "the user's policy"],
)
def test_a_command_sets_how_long_threads_spin_before_torch_reads_it(
    users: dict[str, str], spins: str | None
) -> None:
    """libgomp reads the variable once, when torch is imported."""
    says = "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    command = f"import os, sys, fopd_cli.cli as cli; cli.app = lambda **_: {says}; cli.main()"
    inherited = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**inherited, **users},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{spins} False\n"
