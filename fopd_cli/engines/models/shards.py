"""Weights read straight to where they are used: no rank holds more than its shards, and main memory never
holds a model that runs on an accelerator.

    empty     the architecture, its parameters on the meta device: shapes without memory
    sharded   by the engine that runs it, if there are several ranks
    filled    each rank makes memory for its shards, and reads its own part of each tensor from the files

Files of which transformers makes a model in a way that `assembly` does not know are loaded as usual, whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fopd_cli.engines.models import hf
from fopd_cli.engines.models.assembly import Piece, Pieces, pieces_of
from fopd_cli.engines.models.checkpoint_files import CheckpointFiles, Read
from fopd_cli.engines.tokens import rope


@dataclass(frozen=True)
class Unread:
    """A model's weights, still in its files. `fresh` gives those that no file holds, whole, by name and
    shape: adapters that have learned nothing.
    """

    files: CheckpointFiles
    pieces: Pieces  # of each parameter and persistent buffer
    fresh: Callable[[str, torch.Size], Tensor | None] = lambda name, shape: None

    @torch.no_grad()
    def fill(self, root: nn.Module, lm: nn.Module, device: torch.device) -> None:
        """Give the parameters of `lm`, which is part of `root`, memory on `device` and their values. `root`
        is what was sharded.
        """
        every = lm.named_parameters(remove_duplicate=False)
        unmade = {name for name, tensor in every if tensor.device.type == "meta"}
        _give_memory(root, device)
        with self.files.reading() as read:
            for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
                plain = name.replace("_checkpoint_wrapped_module.", "")
                local, start = _own_part(tensor)
                if (pieces := self.pieces.get(plain.replace(".base_layer", ""))) is not None:
                    for piece in pieces:
                        _copy(piece, local, start, read)
                elif (new := self.fresh(plain, tensor.shape)) is not None:
                    local.copy_(new[tuple(slice(a, a + n) for a, n in zip(start, local.shape, strict=True))])
                elif name in unmade:
                    raise RuntimeError(f"{plain} is in no file")  # it would be whatever was in memory

    def place(self, root: nn.Module, lm: nn.Module, device: torch.device) -> None:
        """`fill` for a model that is not sharded: `.to(device)` cannot move what has no memory."""
        root._apply(lambda t: t if t.device.type == "meta" else t.to(device))
        self.fill(root, lm, device)


def direct(device: torch.device, world: int) -> bool:
    """Whether a model's weights are read where they are used, and not all of them on the host first."""
    return world > 1 or device.type != "cpu"


def empty(model: str, key: str, dtype: torch.dtype) -> tuple[Any, Unread] | None:
    """The causal language model in `dtype`, in evaluation mode, without its weights; None if they must be
    loaded whole. Raises `UserError` like `hf.load_model`, but does not see whether the model looks ahead.
    """
    config, folder = hf.load_config(model, key), hf.local_folder(model, key)
    report = hf.load_report(str(folder), config, key)
    if report is not None:
        report.refuse(f"{key}: {model!r}")
    files = CheckpointFiles.of(folder)
    pieces = None if files is None else pieces_of(config, files.empty())
    if files is None or pieces is None:
        return None
    lm: Any = hf.empty_model(config, dtype, buffers=True)
    hf.cast(lm, dtype)
    rope.by_sequence(lm)
    return lm.eval(), Unread(files, pieces)


def _give_memory(root: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device. Tied weights stay one parameter, which `_apply` keeps only of
    sharded ones.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in root.modules():
        for name, own in module._parameters.items():
            if own is None or own.device.type != "meta" or isinstance(own, DTensor):
                continue
            if own not in made:
                made[own] = nn.Parameter(torch.empty_like(own, device=device), own.requires_grad)
            module._parameters[name] = made[own]
    root._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)


def _copy(piece: Piece, local: Tensor, start: tuple[int, ...], read: Read) -> None:
    """Read what this rank's part, which begins at `start`, has of a piece."""
    if (common := piece.within(start, local.shape)) is None:
        return
    at = tuple(slice(s.start - a, s.stop - a) for s, a in zip(common, piece.start, strict=True))
    into = local[tuple(slice(s.start - a, s.stop - a) for s, a in zip(common, start, strict=True))]
    into.copy_(read(piece.name, at[1:] if piece.stacked else at).reshape(into.shape))


def _own_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part, and where in the whole tensor it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(start)
