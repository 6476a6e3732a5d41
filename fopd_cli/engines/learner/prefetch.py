"""Micro-batches on their way to the device: the next one is assembled and copied while the previous one
computes.

    host     put 0 together | launch 0's passes | put 1 together | wait for 0 | launch 1's ...
    side     copy 0         |                   | copy 1         |            |
    device                  | forward 0, backward 0 ...................       | forward 1 ...

Copies go through page-locked memory on a stream of their own. The compute stream waits for them before it
uses them, and memory that it used returns to the copies only when it is done with it. On a CPU, where a copy
is complete when it returns, the order of the work is the same and there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lane:
    """Copies to one device, in parallel with what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: T) -> tuple[T, Any]:
        """Start copying all tensors of a batch on the host; returns their copies and the event that marks
        their arrival.
        """
        if self._stream is None:
            return batch, None
        pinned = each_tensor(batch, Tensor.pin_memory)
        with self._on_side():
            there = each_tensor(pinned, lambda t: t.to(self.device, non_blocking=True))
            return there, self._stream.record_event()

    def receive(self, batch: T, arrived: Any) -> T:
        """Make later computation wait for the copies."""
        if arrived is not None:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(arrived)

            def used(tensor: Tensor) -> Tensor:
                tensor.record_stream(computing)
                return tensor

            each_tensor(batch, used)
        return batch

    def _on_side(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Prefetched(Generic[T]):
    """Iterates over batches on the device, each made on the host by one of `makers`. `ahead` starts sending
    the next one; a batch that was not sent ahead is sent when it is asked for.
    """

    def __init__(self, lane: Lane, makers: Sequence[Callable[[], T]]) -> None:
        self._lane, self._makers = lane, iter(makers)
        self._under_way: list[tuple[T, Any]] = []  # at most one

    def ahead(self) -> None:
        make = None if self._under_way else next(self._makers, None)
        if make is not None:
            self._under_way.append(self._lane.send(make()))

    def __iter__(self) -> Iterator[T]:
        while True:
            self.ahead()
            if not self._under_way:
                return
            yield self._lane.receive(*self._under_way.pop())


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with all its tensors changed, in dataclasses and dictionaries as well."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: each_tensor(own, change) for name, own in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: each_tensor(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **changed)
    return value
