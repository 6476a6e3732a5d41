"""A learner's ranks and samplers as worker processes, with the ends of some transports, told what to do one
thing at a time.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import learner_kit
import numpy as np
import torch
import torch.distributed as dist

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec
from fopd_cli.runtime.crew.messages import Lost, Ready, StopCommand
from fopd_cli.runtime.memory.weights import Layout
from fopd_cli.runtime.weights.transport import Transport
from fopd_cli.samples import Request, SamplingParams

Transports = Mapping[str, Transport]


def layout(pair: Path, dtype: torch.dtype) -> Layout:
    """What samplers get of the pair's student."""
    return hf.weight_layout(hf.load_config(str(pair / "student"), "m"), dtype)


@dataclass(frozen=True)
class Learn:
    """Take optimizer step `step`."""

    step: int


@dataclass(frozen=True)
class Publish:
    """By this transport; answered by seconds and bytes."""

    by: str


@dataclass(frozen=True)
class LoadBy:
    """Answered by a `Held`. `dies`: is killed when it has so many tensors."""

    by: str
    version: int
    dies: int | None = None


@dataclass
class Held:
    """What a sampler has after a load: a digest of its weights' bits, and log-probs of what it samples."""

    seconds: float
    digest: str
    logprobs: list[np.ndarray] = field(default_factory=list)


def learner(spec: WorkerSpec, mailbox: Mailbox, transports: Transports, pair: Path, meeting: Path) -> None:
    device = torch.device("cuda" if spec.devices else "cpu")
    if spec.world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=spec.rank, world_size=spec.world
        )
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    engine = FsdpLearner(model, [head], learner_kit.config(), device, spec.rank, spec.world)
    samples = learner_kit.make_samples(pair, width=head.weight.shape[1])
    outlets = {name: transport.outlet(spec) for name, transport in transports.items()}
    mailbox.send(Ready())
    while not isinstance(command := mailbox.receive(block=True), StopCommand):
        began = time.perf_counter()
        if isinstance(command, Learn):
            engine.train(command.step, samples)
            mailbox.send(engine.version)
        else:
            outlet = outlets[command.by]
            nbytes = outlet.write(engine.version, engine.publish(outlet.dtypes))
            mailbox.send((time.perf_counter() - began, nbytes))


def sampler(spec: WorkerSpec, mailbox: Mailbox, transports: Transports, pair: Path) -> None:
    device = torch.device("cuda" if spec.devices else "cpu")
    engine = on_weights(str(pair / "student"), torch.bfloat16, device, concurrency=2)
    inlets = {name: transport.inlet(spec, True) for name, transport in transports.items()}
    mailbox.send(Ready())
    while not isinstance(command := mailbox.receive(block=True), StopCommand):
        inlet, began = inlets[command.by], time.perf_counter()
        arriving = inlet.read(command.version)
        engine.load(command.version, arriving if command.dies is None else dying(arriving, command.dies))
        inlet.check(command.version)
        mailbox.send(Held(time.perf_counter() - began, digest(engine.model), _sampled(engine)))


def dying(weights: Any, after: int) -> Any:
    for number, named in enumerate(weights):
        if number == after:
            os.kill(os.getpid(), signal.SIGKILL)
        yield named


def digest(model: Any) -> str:
    """Of all weights, whatever device they are on."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _sampled(engine: Any) -> list[np.ndarray]:
    prompts = [np.arange(5, 5 + n, dtype=np.int32) for n in (3, 6)]
    engine.submit([Request(i, p, i, SamplingParams(max_new_tokens=8)) for i, p in enumerate(prompts)])
    rollouts = []
    while engine.busy:
        rollouts += engine.step()
    return [r.logprobs for r in sorted(rollouts, key=lambda r: r.key)]


def ask(fleet: Fleet, names: Sequence[str], command: Any, seconds: float = 300.0) -> dict[str, Any]:
    """Tell workers to do something, and wait for all their answers; that of a lost one is a `Lost`."""
    for name in names:
        fleet.send(name, command)
    return answers(fleet, names, seconds)


def answers(fleet: Fleet, names: Sequence[str], seconds: float = 300.0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    while set(names) - found.keys():
        assert time.monotonic() < deadline, f"no answer from {set(names) - found.keys()}"
        found |= {worker.name: message for worker, message in fleet.receive(0.5)}
    for message in found.values():
        assert not isinstance(message, Lost) or "SIGKILL" in message.reason, message.reason
    return {name: found[name] for name in names}
