"""Where an engine's tensors are kept while other roles use its device: in pinned main memory, each in one
buffer that is allocated once.

Tensors that never change (a teacher, the base under adapters) are copied there once; waking is one copy at
bus speed. Tensors that learn are copied both ways, through the same buffers.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Resting:
    """The buffers of one engine. `forgetful`: its weights are reloaded after it wakes, so later sleeps need
    not save them.
    """

    def __init__(self, device: torch.device, forgetful: bool = False) -> None:
        self.device, self.forgetful = device, forgetful
        self._buffers: dict[Any, Tensor] = {}
        self.copied = 0  # bytes copied to main memory, over all sleeps

    def sleep(self, module: nn.Module) -> None:
        """Move all parameters and buffers to main memory; the module then holds those copies."""
        self._visit(module, self._to_rest)

    def wake(self, module: nn.Module) -> None:
        """Move them back, to new device memory."""
        self._visit(module, self._to_device)

    def sleep_states(self, states: MutableMapping[Any, MutableMapping[str, Any]]) -> None:
        """The same for an optimizer's states, which change at every step."""
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
        """Goes through `_apply`, as `.to` does, since that is where a sharded module notices new memory. A
        tensor is known by its place in that order; a tied one comes up again, and is moved once.
        """
        met: dict[int, Tensor] = {}
        met_again = []  # keeps ids from being reused

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
        local = local_part(tensor)
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
        return with_local(tensor, known)

    def _to_device(self, key: Any, tensor: Tensor) -> Tensor:
        local = local_part(tensor)
        return with_local(tensor, torch.empty_like(local, device=self.device).copy_(local, non_blocking=True))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """A tensor that is sharded as this one is, with other memory."""
    if not isinstance(tensor, DTensor):
        return local
    made: Any = DTensor
    return made(local, tensor._spec, requires_grad=tensor.requires_grad)
