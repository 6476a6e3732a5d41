"""A learner's state as it is now, copied to main memory, so that it can be written while training goes on.

The copies are buffers of their own, pinned beside a CUDA device. They are allocated at the first save and
used again by each later one, so only one copy may be in use at a time. Neither a later step nor a sleep of
the learner touches them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fopd_cli.engines.resting import local_part, with_local


class Staging:
    """The buffers of one rank, by place in the state."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of nested dicts and lists, with its tensors copied; returns when they are. Tied weights,
        which a state names twice, are copied once.
        """
        met: dict[tuple[Any, ...], Tensor] = {}
        copied = self._copied((), state, met)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return dict(copied)

    def _copied(self, place: tuple[Any, ...], value: Any, met: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, dict):
            return {key: self._copied((*place, key), inner, met) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._copied((*place, i), inner, met) for i, inner in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        local = local_part(value)
        memory = (local.data_ptr(), local.shape, local.stride(), local.dtype)
        if memory not in met or not local.numel():
            met[memory] = self._filled(place, local)
        return with_local(value, met[memory])

    def _filled(self, place: tuple[Any, ...], local: Tensor) -> Tensor:
        known = self._buffers.get(place)
        if known is None or known.shape != local.shape or known.dtype != local.dtype:
            known = torch.empty(local.shape, dtype=local.dtype, pin_memory=self.device.type == "cuda")
            self._buffers[place] = known
        return known.copy_(local, non_blocking=True)
