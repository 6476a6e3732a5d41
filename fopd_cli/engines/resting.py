"""Where an engine's tensors lie while other roles have its device: in pinned main memory, each in one buffer
that is made once.

What never changes (a teacher, the base under adapters) is copied there the first time and never again; to
wake is one copy at the bus's speed. What learns is copied both ways, into the same buffers.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Resting:
    """The buffers of one engine. `forgetful`: its weights are given anew after it wakes, so that nothing of
    them is ever copied back.
    """

    def __init__(self, device: torch.device, forgetful: bool = False) -> None:
        self.device, self.forgetful = device, forgetful
        self._buffers: dict[Any, Tensor] = {}
        self.copied = 0  # bytes that went to main memory, of all sleeps together

    def sleep(self, module: nn.Module) -> None:
        """All parameters and buffers to main memory; the module's own are those of main memory then."""
        self._visit(module, self._to_rest)

    def wake(self, module: nn.Module) -> None:
        """And back, to new memory of the device."""
        self._visit(module, self._to_device)

    def sleep_states(self, states: MutableMapping[Any, MutableMapping[str, Any]]) -> None:
        """The same of an optimizer's, which change in every step."""
        for place, state in enumerate(states.values()):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[name] = self._to_rest((place, name), value, changes=True)

    def wake_states(self, states: MutableMapping[Any, MutableMapping[str, Any]]) -> None:
        for place, state in enumerate(states.values()):
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    state[name] = self._to_device((place, name), value)

    def _visit(self, module: nn.Module, move: Any) -> None:
        """By `_apply`, as `.to` does it, since a sharded module takes note of new memory there. A tensor is
        known by its place in that order; one that is tied is met again, and moved once.
        """
        met: dict[int, Tensor] = {}
        met_again = []  # keeps ids from being used again

        def each(tensor: Tensor) -> Tensor:
            if id(tensor) not in met:
                met_again.append(tensor)
                met[id(tensor)] = move(len(met), tensor)
            return met[id(tensor)]

        with torch.no_grad():
            module._apply(each)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _to_rest(self, key: Any, tensor: Tensor, changes: bool | None = None) -> Tensor:
        local = _local(tensor)
        known = self._buffers.get(key)
        if changes is None:
            changes = not isinstance(tensor, nn.Parameter) or (tensor.requires_grad and not self.forgetful)
        if known is None or known.shape != local.shape or known.dtype != local.dtype:
            known = torch.empty_like(local, device="cpu", pin_memory=self.device.type == "cuda")
            self._buffers[key] = known
            changes = True
        if changes:
            known.copy_(local, non_blocking=True)
            self.copied += known.nbytes
        return _with_local(tensor, known)

    def _to_device(self, key: Any, tensor: Tensor) -> Tensor:
        local = _local(tensor)
        return _with_local(
            tensor, torch.empty_like(local, device=self.device).copy_(local, non_blocking=True)
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def _with_local(tensor: Tensor, local: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return local
    made: Any = DTensor
    return made(local, tensor._spec, requires_grad=tensor.requires_grad)
