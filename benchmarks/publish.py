#!/usr/bin/env python3
"""Seconds from a step's end to samplers that have its weights, by transport, side by side.

    python benchmarks/publish.py [--pair recipes/real-pair] [--samplers 2] [--rounds 7] [--device cpu]

One learner process holds the pair's student in fp32, each sampler process has a sampler on transformers in
bf16, all as in a run. In each round every transport publishes once and then all samplers load, at the same
time; the order of the transports changes from round to round. Reported are medians over the rounds: seconds
to publish (the learner stands still), seconds to load (the slowest sampler stands still), their sum, and its
ratio to that of `shared` in the same round.

On CUDA, samplers are on the learner's device, where broadcast does not work, or with `--apart` on devices of
their own, where ipc does not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec
from fopd_cli.runtime.crew.messages import Lost, Ready, StopCommand
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.broadcast import Broadcast
from fopd_cli.runtime.weights.ipc import Ipc
from fopd_cli.runtime.weights.transport import Shared, Transport

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 600.0


def learner(spec: WorkerSpec, mailbox: Mailbox, transports: dict[str, Transport], student: str) -> None:
    model = hf.load_model(student, "student", torch.float32).to("cuda" if spec.devices else "cpu")
    weights = model.state_dict()
    outlets = {name: transport.outlet(spec) for name, transport in transports.items()}
    mailbox.send(Ready())
    while not isinstance(command := mailbox.receive(block=True), StopCommand):
        name, version = command
        began = time.perf_counter()
        outlets[name].write(version, ((n, weights[n]) for n in outlets[name].dtypes))
        mailbox.send(time.perf_counter() - began)


def sampler(spec: WorkerSpec, mailbox: Mailbox, transports: dict[str, Transport], student: str) -> None:
    engine = on_weights(student, torch.bfloat16, torch.device("cuda" if spec.devices else "cpu"), 1)
    inlets = {name: transport.inlet(spec, True) for name, transport in transports.items()}
    mailbox.send(Ready())
    while not isinstance(command := mailbox.receive(block=True), StopCommand):
        name, version = command
        began = time.perf_counter()
        engine.load(version, inlets[name].read(version))
        inlets[name].check(version)
        mailbox.send(time.perf_counter() - began)


def ask(fleet: Fleet, names: list[str], command: Any) -> list[float]:
    for name in names:
        fleet.send(name, command)
    found: dict[str, Any] = {}
    while len(found) < len(names):
        found |= {worker.name: message for worker, message in fleet.receive(1.0)}
    if lost := [message.reason for message in found.values() if isinstance(message, Lost)]:
        raise RuntimeError("; ".join(lost))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, default=ROOT / "recipes" / "real-pair")
    parser.add_argument("--samplers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--apart", action="store_true", help="CUDA: samplers on devices of their own")
    args = parser.parse_args()
    cuda, student = args.device == "cuda", str(args.pair.resolve() / "student")
    layout = hf.weight_layout(hf.load_config(student, "student"), torch.bfloat16)
    ours = WorkerSpec("learner", 0, 1, (0,) if cuda else (), args.threads)
    theirs = [
        WorkerSpec("sampler", i, args.samplers, ((i + 1 if args.apart else 0),) if cuda else (), args.threads)
        for i in range(args.samplers)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        transports: dict[str, Transport] = {"shared": Shared(WeightChannel.create(layout))}
        if not cuda or args.apart:
            transports["broadcast"] = Broadcast.create(layout, folder / ".rendezvous-b", TIMEOUT_S, False)
        if not args.apart:
            devices = sorted({d for spec in theirs for d in spec.devices})
            transports["ipc"] = Ipc.create(layout, devices, folder / ".rendezvous-i", False)
        found = _measured(folder, transports, ours, theirs, student, args.rounds)
    size = transports["shared"].host.slot_bytes / 1e9
    print(f"\n{size:.3f} GB in bf16, {args.samplers} samplers, {args.device}, {args.threads} threads each\n")
    print("| transport | publish | load | both | of `shared` in the same round |")
    print("|---|---|---|---|---|")
    base = [sum(times) for times in found["shared"]]
    for name, rounds in found.items():
        publish, load = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratios = [sum(times) / other for times, other in zip(rounds, base, strict=True)]
        print(
            f"| {name} | {publish:.3f} s | {load:.3f} s | {publish + load:.3f} s | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |"
        )


def _measured(
    folder: Path,
    transports: dict[str, Transport],
    ours: WorkerSpec,
    theirs: list[WorkerSpec],
    student: str,
    rounds: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds to publish and to load, by transport and round; a first round does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in transports}
    names = [spec.name for spec in theirs]
    with Fleet(folder, TIMEOUT_S, TIMEOUT_S) as fleet:
        fleet.start(ours, learner, transports, student)
        for spec in theirs:
            fleet.start(spec, sampler, transports, student)
        waiting = 1 + len(theirs)
        while waiting:
            waiting -= len(fleet.receive(1.0))
        order = list(transports)
        for version in range(rounds + 1):
            for name in order:
                publish = ask(fleet, [ours.name], (name, version))[0]
                load = max(ask(fleet, names, (name, version)))
                if version:
                    found[name].append((publish, load))
            order = order[1:] + order[:1]
    return found


if __name__ == "__main__":
    main()
