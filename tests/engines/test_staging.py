"""A learner's state is copied, and the copy is written while the learner does something else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
from torch import Tensor

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.engines.models.shapes import shapes
from fopd_cli.recipe.schema import Learner
from fopd_cli.runtime.memory import model as memory

COPY = "a checkpoint being written"


def pointers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [p for inner in value.values() for p in pointers(inner)]
    local = value.to_local() if hasattr(value, "to_local") else value
    return [local.data_ptr()] if isinstance(local, Tensor) and local.numel() else []


def published(learner: FsdpLearner) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy().copy() for name, tensor in learner.publish()}


def asleep_and_awake(learner: FsdpLearner) -> None:
    """What a sleep does on a device, which a CPU's learner leaves out."""
    learner._resting.sleep(learner.student)
    learner._resting.sleep_states(learner.optimizer.state)
    learner._resting.wake(learner.student)
    learner._resting.wake_states(learner.optimizer.state)


def saved_twice(rank: int, world: int, pair: Path, folder: Path) -> Any:
    """The state after a step, written at once, and from a copy while two more steps and a sleep go by; what a
    learner that read the first publishes after a step, and bytes of the copies on this rank.
    """
    samples = kit.make_samples(pair)
    learner = kit.make_learner(pair, kit.config(), rank, world)
    learner.train(0, samples)
    now, copy = learner.snapshot(staged=False), learner.snapshot(staged=True)
    now.write(folder / "now")
    writing = threading.Thread(target=copy.write, args=(folder / "later",))
    writing.start()
    learner.train(1, samples)
    asleep_and_awake(learner)
    learner.train(2, samples)
    writing.join()
    assert pointers(learner.snapshot(staged=True).state) == pointers(copy.state), "the same memory again"
    found = []
    for name, snapshot in (("now", now), ("later", copy)):
        again = kit.make_learner(pair, kit.config(), rank, world)
        again.restore(folder / name, snapshot.extra)
        again.train(1, samples)
        found.append(published(again))
    return *found, sum(b.nbytes for b in learner._staging._buffers.values())


@pytest.mark.parametrize("world", [1, 2])
def test_a_copy_is_written_as_it_was_whatever_the_learner_does_meanwhile(
    pair: Path, tmp_path: Path, world: int
) -> None:
    """And takes as much memory as the memory model says, on two ranks half of it each."""
    arguments = (pair, tmp_path)
    now, later, nbytes = (
        saved_twice(0, 1, *arguments)
        if world == 1
        else kit.on_ranks(world, tmp_path, saved_twice, *arguments)
    )
    for name, weight in now.items():
        np.testing.assert_array_equal(weight, later[name])
    with_copy, without = (
        memory.learner(
            Learner(),
            shapes(hf.load_config(str(pair / "student"), "m")),
            [],
            world=world,
            compute=torch.float32,
            cuda=cuda,
            tokens=64,
            longest=64,
            staged=staged,
        )
        for cuda, staged in ((True, True), (False, False))
    )
    (part,) = (p for p in with_copy.host if p.what == COPY)
    assert part.nbytes == pytest.approx(nbytes, rel=0.02)
    assert sum(p.nbytes for p in without.always if p.what == COPY) == 0
