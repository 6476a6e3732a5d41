"""The weights as one rank holds them, to be published while the next step computes: nothing is gathered.

FSDP2 cuts a weight along its first dimension, so a shard is one run of its elements. Each rank writes its own
runs, over its own bus, and no collective of a publication meets one of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fopd_cli.engines.learner import lora
from fopd_cli.engines.resting import local_part


@dataclass(frozen=True)
class Piece:
    """A run of one weight's elements, in flat order from `start` on; none, where another rank holds it.

    `read` gives them as of the piece's making until the weights change; from any thread.
    """

    name: str
    start: int
    read: Callable[[], Tensor]


def pieces(lm: nn.Module, adapter_only: bool, rank: int) -> list[Piece] | None:
    """This rank's part of what `lora.merged` (or `lora.adapters`) gives, in that order. None if adapters are
    to be merged: that takes whole weights, and memory for them that is free only between two steps.
    """
    if adapter_only:
        return [_held(name, tensor, rank) for name, tensor in lora.held_adapters(lm)]
    found = []
    for name, tensor, layer in lora.base(lm):
        if layer is not None:
            return None
        found.append(_held(name, tensor, rank))
    return found


def _held(name: str, tensor: Tensor, rank: int) -> Piece:
    local = local_part(tensor)
    if not isinstance(tensor, DTensor):  # every rank holds all of it
        own = local if rank == 0 else local.new_empty(0)
        return Piece(name, 0, lambda: own)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if shape[1:] != tuple(tensor.shape)[1:]:
        raise RuntimeError(f"{name} is not sharded along its first dimension")
    return Piece(name, offset[0] * prod(shape[1:]), lambda: local)
