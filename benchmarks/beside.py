#!/usr/bin/env python3
"""What the publication of a version costs the learner's next step.

    python benchmarks/beside.py [--hidden 512] [--layers 8] [--ranks 1] [--repeats 10]

The same optimizer step, with its publication in three ways, one after another within each repeat:

    gathered   every tensor made whole, then copied by rank 0; the next step waits (as before)
    by shards  every rank copies what it holds; the next step waits
    beside     the same while the next step computes (as in a run)

Prints the median of a step with a publication and of one without (`none`), of the publication by shards
alone, and what it costs a step beside which it goes on. Several ranks are processes on the CPU's cores, over
gloo; on a CUDA device there is one rank, in bf16.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Freshness, Learner
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.crew.publisher import Publisher
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.transport import Shared
from fopd_cli.samples import Rollout, Sample, TeacherTargets

Rank = multiprocessing.get_context("spawn").Process
CUDA = torch.cuda.is_available()
VOCAB, PROMPT = 4096, 8


def make_learner(args: argparse.Namespace, rank: int) -> FsdpLearner:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        head_dim=64,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        tie_word_embeddings=True,
    )
    learning = LearnerConfig(
        learner=Learner(lr=1e-9, warmup_steps=0, steps=10**6, micro_tokens=args.tokens),
        freshness=Freshness(policy="async"),
        loss=LossSpec("reverse_kl", "full"),
        average="sample",
        anchor=0.0,
        compute_dtype=torch.bfloat16 if CUDA else torch.float32,
        vocab=VOCAB,
        longest=args.tokens,
    )
    head = torch.randn(VOCAB, args.hidden) / args.hidden**0.5
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    device = torch.device("cuda" if CUDA else "cpu")
    return FsdpLearner(student, [head], learning, device, rank, args.ranks)


def make_samples(args: argparse.Namespace) -> list[Sample]:
    rng, found = np.random.Generator(np.random.PCG64(0)), []
    length = args.tokens // 4 - PROMPT
    for key in range(args.samples):
        ids = rng.integers(0, VOCAB, size=PROMPT + length).astype(np.int32)
        logprobs = np.full(length, -np.log(VOCAB), dtype=np.float32)
        mask = np.ones(length, dtype=bool)
        rollout = Rollout(key, ids, PROMPT, mask, logprobs, [(0, 0, length)], "length")
        hidden = torch.randn(length, args.hidden)
        found.append(Sample(rollout, TeacherTargets("hidden", hidden=hidden), lag=0))
    return found


def shared_by_all(folder: Path, learner: FsdpLearner, ranks: int) -> WeightChannel:
    layout = [(n, tuple(t.shape), torch.bfloat16) for n, t in learner.publish()]
    size = 2 * WeightChannel(layout, torch.empty(0), torch.empty(0)).slot_bytes
    memory = torch.from_file(str(folder / "slots"), shared=True, size=size, dtype=torch.uint8)
    stamps = torch.from_file(str(folder / "stamps"), shared=True, size=4 * ranks, dtype=torch.int64)
    return WeightChannel(layout, memory, stamps.view(2, ranks, 2))


def run(rank: int, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // args.ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ranks
    )
    learner, samples = make_learner(args, rank), make_samples(args)
    channel, posted = shared_by_all(folder, learner, args.ranks), list[Any]()
    outlet = Shared(channel).outlet(WorkerSpec("learner", rank, args.ranks, (0,) if CUDA else (), 1))
    publisher = Publisher(outlet, CUDA, posted.append)

    def step() -> None:
        learner.train(learner.version, samples, publisher.let_update)
        publisher.finish()

    def gathered() -> None:
        outlet.write(learner.version, learner.publish(channel.dtypes))

    def by_shards() -> None:
        publisher.publish(learner)
        publisher.finish()

    ways: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "gathered": gathered,
        "by shards": by_shards,
        "beside": lambda: publisher.publish(learner),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    alone: list[float] = []
    for repeat in range(args.repeats + 2):
        for way, publish in ways.items():
            dist.barrier()
            began = time.perf_counter()
            publish()  # of the version before: the step that follows is the one that it may delay
            published = time.perf_counter()
            step()
            if CUDA:
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[way].append(time.perf_counter() - began)
                alone += [published - began] if way == "by shards" else []
    if rank == 0:
        report(args, channel, {w: statistics.median(s) for w, s in seconds.items()}, statistics.median(alone))
    assert not [message for message in posted if isinstance(message, m.Failed)]
    dist.barrier()
    os._exit(0)  # past the interpreter's teardown, in which gloo's threads sometimes abort the process


def report(args: argparse.Namespace, channel: WeightChannel, medians: dict[str, float], alone: float) -> None:
    where = torch.cuda.get_device_name(0) if CUDA else f"{args.ranks} x {torch.get_num_threads()} threads"
    print(f"{channel.slot_bytes / 1e6:.0f} MB, {args.samples * args.tokens // 4} tokens a step, {where}")
    for way, value in medians.items():
        print(f"  {way:10} {value * 1e3:8.1f} ms")
    cost = medians["beside"] - medians["none"]
    print(f"  by shards alone {alone * 1e3:.1f} ms; beside, it costs a step {cost * 1e3:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch, which is four samples")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if CUDA and args.ranks > 1:
        parser.error("--ranks: on a CUDA device there is one")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Rank(target=run, args=(rank, args, Path(folder))) for rank in range(args.ranks)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            sys.exit("a rank has failed")


if __name__ == "__main__":
    main()
