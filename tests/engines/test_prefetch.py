"""Micro-batches on their way to the device, and the order of events."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch

from fopd_cli.engines.learner import learner as learner_module
from fopd_cli.engines.learner.prefetch import Lane, Prefetched, each_tensor

CPU = torch.device("cpu")


class Watched(Lane):
    """Records what passes."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(CPU)
        self.log = log

    def send(self, batch: Any) -> tuple[Any, Any]:
        self.log.append("send")
        return super().send(batch)

    def receive(self, batch: Any, arrived: Any) -> Any:
        self.log.append("receive")
        return super().receive(batch, arrived)


def test_the_next_micro_batch_leaves_before_anybody_waits_for_the_one_before(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies are queued after the previous one's backward pass, and before a figure is first read."""
    samples, log = kit.make_samples(pair, 4), []  # type: list[Any], list[str]
    learner = kit.make_learner(pair, kit.config(micro_tokens=1))
    learner.lane = Watched(log)
    learner.student.register_forward_hook(lambda *_: log.append("forward"))
    norm = learner.student.lm.model.norm.weight  # used once: one note a backward pass
    norm.register_post_accumulate_grad_hook(lambda _: log.append("backward"))
    stats: Callable[..., Any] = learner_module._stats
    monkeypatch.setattr(learner_module, "_stats", lambda *a: log.append("look") or stats(*a))
    learner.train(0, samples)
    one = ["receive", "forward", "backward", "send", "look"]
    assert log == ["send", *one * 3, "receive", "forward", "backward", "look"]


def test_at_most_one_is_under_way() -> None:
    made: list[int] = []
    batches = Prefetched(Lane(CPU), [lambda i=i: made.append(i) or i for i in range(4)])
    found = []
    for batch in batches:
        assert made[-1] == batch
        batches.ahead()
        batches.ahead()
        assert made == list(range(min(batch + 2, 4)))
        found.append(batch)
    assert found == [0, 1, 2, 3]


def test_all_tensors_of_a_batch_go(pair: Path) -> None:
    """Here to the meta device, with what a packed row needs besides its ids."""
    batch = learner_module.MicroBatch.of(kit.make_samples(pair, 3), True)
    moved = each_tensor(batch, lambda t: t.to("meta"))
    left: list[torch.Tensor] = []
    each_tensor(moved, lambda t: left.append(t) or t if t.device.type != "meta" else t)
    assert left == []
    assert moved.tokens.extra["max_length_q"] == batch.tokens.extra["max_length_q"]
    assert moved.at.teacher_hidden.shape == batch.at.teacher_hidden.shape
