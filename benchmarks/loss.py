#!/usr/bin/env python3
"""The chunked loss against its rivals: time and peak memory of reverse KL over the full vocabulary, forward
and backward.

    python benchmarks/loss.py [--quick | --largest] [--rounds 3] [--dtype fp32]

ours            fopd_cli.losses.chunked, weights 1; with freshness weights and the anchor, which no rival
                computes; and with these fused by torch.compile
naive           plain PyTorch: both logits, log_softmax, KL, backward
TRL GKD         GKDTrainer.generalized_jsd_loss on the same logits, beta 1
TRL chunked     the loss of DistillationTrainer, in tiles of tokens and vocabulary (Triton on a GPU, PyTorch
                on a CPU)
Liger chunked   LigerFusedLinearJSDLoss, beta 1 (pip install --no-deps liger-kernel), compiled and not
Liger fused     LigerFusedLinearJSD, Triton, on a GPU only

Each contender has a process of its own, so that peak memory is its own. They take turns within a round,
except on a GPU and with `--largest`, where they would not fit together and run one after another. The first
round is not counted. `extra` is the peak above the inputs, less the two gradients that are the result
(float32 or bf16 `[tokens, hidden]` and `[vocab, hidden]`).
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.multiprocessing as mp
from torch import Tensor

from fopd_cli.losses.chunked import chunked_objective
from fopd_cli.losses.objective import shares, weighting
from fopd_cli.losses.terms import LossSpec, Positions

# (tokens, hidden, vocabulary)
SIZES = {
    "cpu quick": [(2048, 256, 128_256)],
    "cpu": [(2048, 512, 32_000), (2048, 512, 128_256)],
    "cpu largest": [(4096, 1024, 152_064)],  # what plain PyTorch can hold in 20 GB
    "cuda quick": [(4096, 2048, 128_256)],
    "cuda": [(4096, 2048, 32_000), (4096, 2048, 128_256), (8192, 4096, 128_256)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLES = 8
SLOW = ("ours, compiled", "TRL GKD", "TRL chunked", "Liger chunked")  # left out by --quick


class Problem:
    """Inputs on a device; the teacher is as wide as the student."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
        tokens, hidden, vocab = size
        make = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, device=device, dtype=dtype)

        self.hidden, self.head = normal(tokens, hidden), normal(vocab, hidden) / hidden**0.5
        self.teacher_hidden, self.teacher_head = normal(tokens, hidden), normal(vocab, hidden) / hidden**0.5
        self.tokens = torch.randint(vocab, (tokens,), generator=make, device=device)
        self.behaviour = torch.full((tokens,), -9.0, device=device)
        self.sample = torch.arange(tokens, device=device) * SAMPLES // tokens
        self.mask = torch.ones(tokens, dtype=torch.bool, device=device)
        self.result_bytes = (self.hidden.numel() + self.head.numel()) * dtype.itemsize

    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.head.detach().requires_grad_()


def ours(p: Problem, hidden: Tensor, head: Tensor, weighed: bool = False, compiled: bool = False) -> Tensor:
    counts = torch.bincount(p.sample).float()
    share = shares(counts, "token", SAMPLES, len(p.tokens))
    weigh = (lambda samples, drifts: torch.exp(-drifts.sqrt()) / 2) if weighed else None
    at = Positions(p.tokens, p.behaviour, teacher_hidden=p.teacher_hidden)
    how = weighting(p.sample, p.mask, p.mask, share, 1.0 if weighed else 0.0, weigh)
    spec = LossSpec("reverse_kl", "full", compile=compiled)
    return chunked_objective(spec, hidden, at, head, p.teacher_head, how)[0]


def naive(p: Problem, hidden: Tensor, head: Tensor) -> Tensor:
    s = torch.log_softmax((hidden @ head.T).float(), -1)
    with torch.no_grad():
        t = torch.log_softmax((p.teacher_hidden @ p.teacher_head.T).float(), -1)
    return (s.exp() * (s - t)).sum(-1).mean()


def trl_gkd(p: Problem, hidden: Tensor, head: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = p.teacher_hidden @ p.teacher_head.T
    loss: Tensor = GKDTrainer.generalized_jsd_loss(hidden @ head.T, teacher, beta=1.0, reduction="sum")
    return loss / len(p.tokens)


def trl_chunked(p: Problem, hidden: Tensor, head: Tensor) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = p.mask[None].long()
    value: Tensor = _chunked_divergence_loss(
        hidden[None], p.teacher_hidden[None], head, p.teacher_head, mask, beta=1.0
    )[0]
    return value


def liger_chunked(p: Problem, hidden: Tensor, head: Tensor, compiled: bool = False) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled)
    value: Tensor = loss(hidden, head, p.teacher_hidden, p.teacher_head, p.tokens)
    return value


def liger_fused(p: Problem, hidden: Tensor, head: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearJSD

    value: Tensor = LigerFusedLinearJSD(jsd_beta=1.0)(hidden, head, p.teacher_hidden, p.teacher_head)
    return value


CONTENDERS: dict[str, Callable[[Problem, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "ours, weights and anchor": lambda p, h, w: ours(p, h, w, weighed=True),
    "ours, compiled": lambda p, h, w: ours(p, h, w, weighed=True, compiled=True),
    "naive": naive,
    "TRL GKD": trl_gkd,
    "TRL chunked": trl_chunked,
    "Liger chunked": liger_chunked,
    "Liger chunked, compiled": lambda p, h, w: liger_chunked(p, h, w, compiled=True),
    "Liger fused (Triton)": liger_fused,
}


class PeakMemory:
    """Highest resident memory above the start, sampled by a thread (CPU); or the allocator's (CUDA)."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        self.before = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def once(p: Problem, loss: Callable[[Problem, Tensor, Tensor], Tensor], device: str) -> dict[str, float]:
    """Forward and backward; returns seconds, extra bytes, and the results."""
    hidden, head = p.inputs()
    with PeakMemory(device) as memory:
        start = time.perf_counter()
        value = loss(p, hidden, head)
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    assert hidden.grad is not None
    assert head.grad is not None
    return {
        "seconds": seconds,
        "extra": max(0, memory.peak - memory.before - p.result_bytes),
        "loss": value.item(),
        "hidden": hidden.grad.float().norm().item(),
        "head": head.grad.float().norm().item(),
    }


def serve(pipe: Any, name: str, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    """A contender's process: one measurement per request."""
    problem = Problem(size, dtype, device)
    while pipe.recv():
        try:
            pipe.send(once(problem, CONTENDERS[name], device))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")


def race(
    size: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int, names: list[str]
) -> dict[str, Any]:
    """Some contenders over a few rounds: by name the list of measurements, or why it does not run."""
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, name, size, dtype, device), daemon=True))
        processes[-1].start()
    found: dict[str, Any] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if isinstance(found[name], str):
                continue
            pipes[name].send(True)
            result = pipes[name].recv()
            if isinstance(result, str):
                found[name] = result
            elif number > 0:
                found[name].append(result)
    for process in processes:
        process.kill()
        process.join()
    return found


def report(size: tuple[int, int, int], found: dict[str, Any]) -> str:
    """A table; ratios are rival / ours, round by round, so above 1 is in our favour."""
    mine = found["ours"]
    rows = [
        f"\n{size[0]:,} tokens x {size[1]:,} x {size[2]:,}\n",
        "| | ms | extra MB | time / ours | extra / ours | loss | gradient norms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in found.items():
        if isinstance(results, str):
            rows.append(f"| {name} | does not run here: {results} | | | | | |")
            continue
        seconds, extra = (statistics.median(r[key] for r in results) for key in ("seconds", "extra"))
        times = statistics.median(r["seconds"] / m["seconds"] for r, m in zip(results, mine, strict=True))
        memory = extra / max(1.0, statistics.median(m["extra"] for m in mine))
        last = results[-1]
        rows.append(
            f"| {name} | {seconds * 1e3:,.0f} | {extra / 1e6:,.0f} | {times:.2f} | {memory:.1f} | "
            f"{last['loss']:.5f} | {last['hidden']:.4g}, {last['head']:.4g} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    parser.add_argument("--largest", action="store_true", help="the largest size that fits 20 GB of RAM")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype or ("bf16" if device == "cuda" else "fp32")]
    rounds = args.rounds or (1 if args.quick else 3)
    names = [name for name in CONTENDERS if not (args.quick and name in SLOW)]
    if args.largest:
        names = [name for name in names if name not in ("TRL GKD", "Liger chunked")]
    print(
        f"{device}, {dtype}, {torch.get_num_threads()} threads, {rounds} rounds after one to warm up",
        flush=True,
    )
    tables = []
    groups = [[name] for name in names] if device == "cuda" or args.largest else [names]
    which = " quick" if args.quick else " largest" if args.largest and device == "cpu" else ""
    for size in SIZES[device + which]:
        found: dict[str, Any] = {}
        for group in groups:
            found |= race(size, dtype, device, rounds, group)
        tables.append(report(size, found))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
