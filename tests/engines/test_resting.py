"""Sleep and wake without a GPU: the tensors move to other memory and back, as on a GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
from conftest import SLOW
from torch import nn

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf
from fopd_cli.engines.resting import Resting

CPU = torch.device("cpu")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros(3))


def pointers(module: nn.Module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


def test_frozen_weights_have_one_copy_that_is_never_copied_back() -> None:
    module, resting = Tied().requires_grad_(False), Resting(CPU)
    weight = module.first.weight.clone()
    at_rest = []
    for _ in range(3):
        awake = pointers(module)
        resting.sleep(module)
        at_rest.append(pointers(module))
        assert not set(awake) & set(at_rest[-1])
        resting.wake(module)
        assert not set(pointers(module)) & set(at_rest[-1])
        assert module.second.weight is module.first.weight
        torch.testing.assert_close(module.first.weight, weight, rtol=0, atol=0)
        with torch.no_grad():
            module.first.weight.fill_(9)  # never happens to a frozen weight: it shows what is copied
    assert at_rest[0] == at_rest[1] == at_rest[2]
    assert resting.copied == 64 + 3 * 12  # the weight once, the buffer each time


def test_what_learns_goes_both_ways_through_the_same_memory() -> None:
    module, resting = Tied(), Resting(CPU)
    parameter, rested = module.first.weight, set()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for step in range(3):
        module.second(module.first(torch.ones(1, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before = [module.first.weight.clone(), *(v.clone() for v in optimizer.state[parameter].values())]
        resting.sleep(module)
        resting.sleep_states(optimizer.state)
        rested.add(module.first.weight.data_ptr())
        resting.wake(module)
        resting.wake_states(optimizer.state)
        after = [module.first.weight, *optimizer.state[parameter].values()]
        assert module.first.weight is parameter, step
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(rested) == 1


def test_a_samplers_weights_are_given_anew_and_never_copied_back() -> None:
    module, resting = Tied(), Resting(CPU, forgetful=True)
    for _ in range(3):
        resting.sleep(module)
        resting.wake(module)
    assert resting.copied == 64 + 3 * 12


def trained(rank: int, world: int, pair: str, adapters: bool, sleeps: bool) -> Any:
    """Three steps in bf16, with or without a sleep between them; losses, weights, what was copied."""
    samples = kit.make_samples(Path(pair))
    model: Any = hf.load_model(str(Path(pair) / "student"), "m", torch.float32)
    if adapters:
        lora.add_adapters(model, 4, 8.0, "all-linear", 0, torch.bfloat16, False)
    cfg = kit.config(compute_dtype=torch.bfloat16)
    head = hf.load_head(str(Path(pair) / "teacher"), "m", torch.float32)
    learner = kit.FsdpLearner(model, [head], cfg, CPU, rank, world)
    losses = []
    for step in range(3):
        losses.append(learner.train(step, samples).loss)
        if sleeps:
            learner.optimizer.zero_grad(set_to_none=True)
            learner._resting.sleep(learner.student)
            learner._resting.sleep_states(learner.optimizer.state)
            learner._resting.wake(learner.student)
            learner._resting.wake_states(learner.optimizer.state)
    weights = {name: tensor.float().numpy().copy() for name, tensor in learner.publish()}
    return losses, weights, learner._resting.copied


def test_a_sharded_learner_that_slept_is_bitwise_the_one_that_did_not(pair: Path, tmp_path: Path) -> None:
    """Two ranks with shards of uneven size, which FSDP pads again when it sees new memory."""
    found = [
        kit.on_ranks(2, _folder(tmp_path, str(sleeps)), trained, str(pair), False, sleeps)
        for sleeps in (False, True)
    ]
    assert found[0][0] == found[1][0]
    for name, weight in found[0][1].items():
        np.testing.assert_array_equal(weight, found[1][1][name])


@SLOW
def test_the_base_under_adapters_is_copied_once(pair: Path, tmp_path: Path) -> None:
    losses, _, copied = kit.on_ranks(2, _folder(tmp_path, "lora"), trained, str(pair), True, True)
    base = sum(p.numel() for p in hf.load_model(str(pair / "student"), "m", torch.float32).parameters())
    assert losses[2] < losses[0]
    assert (
        base < copied < 3 * base
    )  # in two bytes over two ranks; three copies of the base alone would be more


def _folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def test_teacher_heads_rest_in_one_page_locked_copy(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made at the first sleep, whatever comes later. The device is without memory here, and what it is to
    wait for does not exist.
    """
    locked: list[int] = []

    def lock(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() in locked:
            return tensor
        copy = tensor.clone()
        locked.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", lock)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    learner = kit.make_learner(pair, kit.config())
    weight = learner.teacher_heads[0].weight.clone()
    learner.device = torch.device("meta")
    learner.config = kit.config(offload=True)  # heads are all that moves
    for _ in range(3):
        learner.sleep()
        assert [head.weight.data_ptr() for head in learner.teacher_heads] == locked
        torch.testing.assert_close(learner.teacher_heads[0].weight, weight, rtol=0, atol=0)
        learner.wake()
        assert learner.teacher_heads[0].weight.device.type == "meta"
