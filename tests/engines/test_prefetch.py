"""Micro-batches on their way to the device, and the order of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch

from fopd_cli.engines.learner import learner as learner_module
from fopd_cli.engines.learner.prefetch import Lane, Prefetched, each_tensor

CPU = torch.device("cpu")
BATCHES = [{"ids": torch.tensor(2 * i), "at": torch.tensor(2 * i + 1)} for i in range(3)]


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


class Stream:
    """Notes what a stream of a device is asked to do, and in which order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> int:
        self.log.append(f"{self.name}: event {self.events}")
        self.events += 1
        return self.events - 1

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name}: wait for event {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What all streams do; `compute` is current until another is."""
    log: list[str] = []
    current = [Stream("compute", log)]
    to = torch.Tensor.to

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        log.append(f"pin {int(tensor)}")
        return tensor.clone()

    def copy(tensor: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
        log.append(f"{current[-1].name}: {'copy' if non_blocking else 'wait and copy'} {int(tensor)}")
        return to(tensor, *args)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name}: keep {int(tensor)}")
    )
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    return log


def test_computation_waits_for_the_copies_and_they_for_memory_that_it_uses(log: list[str]) -> None:
    """Without the wait a batch would be read before it is there; without the note of who reads it, the next
    one's copy could get its memory.
    """
    lane = Lane(CPU)
    lane._stream = Stream("side", log)  # as beside a device
    batches = Prefetched(lane, [lambda b=b: b for b in BATCHES])
    for i, batch in enumerate(batches):
        log.append(f"compute: {int(batch['ids'])}, {int(batch['at'])}")
        if i == 0:
            batches.ahead()

    def sent(i: int) -> list[str]:
        x, y = 2 * i, 2 * i + 1
        return [f"pin {x}", f"pin {y}", f"side: copy {x}", f"side: copy {y}", f"side: event {i}"]

    def used(i: int) -> list[str]:
        x, y = 2 * i, 2 * i + 1
        kept = [f"compute: keep {x}", f"compute: keep {y}"]
        return [f"compute: wait for event {i}", *kept, f"compute: {x}, {y}"]

    assert log == [*sent(0), *used(0), *sent(1), *used(1), *sent(2), *used(2)]


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
