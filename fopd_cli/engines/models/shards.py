"""Weights read straight into the shards of a model: no rank ever holds all of it.

    empty     the architecture, its parameters on the meta device: shapes without memory
    sharded   by the engine that runs it
    filled    each rank makes memory for its shards, and reads its own rows of each tensor from the files

Files that name or shape a weight differently from the model (experts one by one, say) must be assembled by
transformers, whole; such models are loaded as usual.
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
from fopd_cli.engines.models.checkpoint_files import CheckpointFiles
from fopd_cli.engines.models.checkpoint_format import converts
from fopd_cli.engines.tokens import rope


@dataclass(frozen=True)
class Unread:
    """A model's weights, still in its files. `fresh` gives those that no file holds, whole, by name and
    shape: adapters that have learned nothing.
    """

    files: CheckpointFiles
    names: dict[str, str]  # of each parameter and persistent buffer -> its name in the files
    fresh: Callable[[str, torch.Size], Tensor | None] = lambda name, shape: None

    @torch.no_grad()
    def fill(self, root: nn.Module, lm: nn.Module, device: torch.device) -> None:
        """Give the parameters of `lm`, which is part of `root`, memory on `device` and their values. `root`
        is what was sharded.
        """
        root._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
        for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
            plain = name.replace("_checkpoint_wrapped_module.", "")
            found = self.names.get(plain.replace(".base_layer", ""))
            local, start = _own_part(tensor)
            if found is not None:
                local.copy_(self.files.part(found, start, tuple(local.shape)))
            elif (new := self.fresh(plain, tensor.shape)) is not None:
                local.copy_(new[tuple(slice(a, a + n) for a, n in zip(start, local.shape, strict=True))])


def empty(model: str, key: str, dtype: torch.dtype) -> tuple[Any, Unread] | None:
    """The causal language model in `dtype`, in evaluation mode, without its weights; None if they must be
    loaded whole. Raises `UserError` like `hf.load_model`, but does not see whether the model looks ahead.
    """
    config, folder = hf.load_config(model, key), hf.local_folder(model, key)
    report = hf.load_report(str(folder), config, key)
    if report is not None:
        report.refuse(f"{key}: {model!r}")
    files = CheckpointFiles.of(folder)
    names = None if files is None or converts(str(folder)) else _names(files, config)
    if files is None or names is None:
        return None
    lm: Any = hf.empty_model(config, dtype, buffers=True)
    hf.cast(lm, dtype)
    rope.by_sequence(lm)
    return lm.eval(), Unread(files, names)


def _names(files: CheckpointFiles, config: Any) -> dict[str, str] | None:
    """The name in the files of each tensor of the model; None if one is missing, or has another shape."""
    lm, there = hf.empty_model(config), files.empty()
    others: dict[str, list[str]] = {}
    for other, name in hf.tied_names(config).items():
        others.setdefault(name, []).append(other)
    found = {}
    for name, tensor in lm.state_dict().items():
        own = next((n for n in (name, *others.get(name, ())) if n in there), None)
        if own is None or there[own].shape != tensor.shape:
            if name not in hf.tied_names(config):
                return None
            continue
        found[name] = own
    return found


def _own_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part, and where in the whole tensor it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(start)
