#!/usr/bin/env python3
"""What starting takes of a host's memory: learner and teacher, loaded whole or read into shards.

    python benchmarks/startup.py MODEL [--ranks 1 2 4]

MODEL is a directory with weights, for example recipes/real-pair/teacher (scripts/make_real_pair). Ranks are
processes on the CPU's cores, over gloo. For each, prints the largest peak of any rank, in multiples of the
model's bytes in fp32: anonymous memory above what the process had before it began, without pages of mapped
files, which the kernel can take back. Then what all ranks hold together at the worst, and the seconds of the
slowest. The learner has fp32 masters; its optimizer's states come with the first step and are not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Freshness, Learner

Spawned = multiprocessing.get_context("spawn")
CPU = torch.device("cpu")
EVERY = 0.002  # seconds between two looks at the memory


def held() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def read(model: str, dtype: torch.dtype, whole: bool) -> tuple[Any, shards.Unread | None]:
    if whole:
        return hf.load_model(model, "MODEL", dtype), None
    if (found := shards.empty(model, "MODEL", dtype)) is None:
        raise SystemExit(f"{model}: this architecture cannot be read into shards")
    return found


def learner(model: str, rank: int, world: int, whole: bool) -> Any:
    lm, unread = read(model, torch.float32, whole)
    config = LearnerConfig(
        learner=Learner(activation_checkpointing=True),
        freshness=Freshness(policy="async"),
        loss=LossSpec("reverse_kl", "topk"),
        average="sample",
        anchor=0.0,
        compute_dtype=torch.bfloat16,
        vocab=lm.config.vocab_size,
        longest=64,
    )
    return FsdpLearner(lm, [], config, CPU, rank, world, unread)


def teacher(model: str, rank: int, world: int, whole: bool) -> Any:
    lm, unread = read(model, torch.bfloat16, whole)
    return TransformersTeacher(lm, CPU, world, 4096, lm.config.vocab_size, 64, unread=unread)


ROLES: dict[str, Callable[..., Any]] = {"learner": learner, "teacher": teacher}


def start(rank: int, world: int, role: str, whole: bool, model: str, folder: str, found: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    hf.empty_model(hf.load_config(model, "MODEL"), torch.float32)  # what is imported is not counted
    before, peak, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch)
    dist.barrier()
    began = time.monotonic()
    watcher.start()
    engine = ROLES[role](model, rank, world, whole)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    found.put((max(peak[0], held()) - before, seconds))
    dist.barrier()
    dist.destroy_process_group()
    del engine


def measured(world: int, role: str, whole: bool, model: str) -> list[tuple[int, float]]:
    """Each rank's peak in bytes, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        found = Spawned.SimpleQueue()
        ranks = [
            Spawned.Process(target=start, args=(rank, world, role, whole, model, folder, found))
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            if rank.exitcode:
                raise SystemExit(f"a rank ended with exit code {rank.exitcode}")
        return [found.get() for _ in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    config = hf.load_config(args.model, "MODEL")
    size = 4 * sum(p.numel() for p in hf.empty_model(config, torch.float32).parameters())
    print(f"{args.model}: {size / 1e9:.2f} GB in fp32\n")
    print("| role | ranks | weights | peak of a rank | of all ranks | seconds |\n|---|---|---|---|---|---|")
    for role in ROLES:
        for world in args.ranks:
            for whole in (True, False):
                found = measured(world, role, whole, args.model)
                most, total = max(peak for peak, _ in found), sum(peak for peak, _ in found)
                how = "loaded whole" if whole else "read into shards"
                cells = f"{most / size:.2f} | {total / size:.2f} | {max(s for _, s in found):.1f}"
                print(f"| {role} | {world} | {how} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
