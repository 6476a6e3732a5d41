"""Where adapters go: linear layers, and the weights of experts and routers, which transformers keeps as bare
parameters.

The output head never gets one. A router gets one only if the recipe says so: it chooses experts, and a small
change to it sends tokens elsewhere. In a state-space mixer only the input projection gets one; its kernels
read the other weights directly and would bypass an adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fopd_cli.engines.models.hf import backbone
from fopd_cli.errors import UserError

ROUTER = re.compile(r"(^|\.)(gate|router)(\.|$)")
# an expert's layers before they were fused
OLD_NAMES = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
SHOWN = 12  # names in an error
ROWS = 7


@dataclass
class Places:
    """Full names of what is adapted."""

    layers: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def choose(lm: Any, targets: Literal["all-linear"] | Sequence[str], router: bool) -> Places:
    """The recipe's targets in this model. Raises `UserError` for a name that it does not have."""
    layers, experts, routers = list(_layers(lm)), list(_experts(lm)), list(_routers(lm))
    if router and not routers:
        raise UserError(f"student.lora.router: {type(lm).__name__} has no router; leave the key out")
    if isinstance(targets, str):
        if not layers + experts:
            raise UserError(
                f"student.lora.targets: {type(lm).__name__} has no linear layer that an adapter could adapt"
            )
        return Places(layers, experts + (routers if router else []))
    found = Places(parameters=list(routers) if router else [])
    for target in targets:
        own = [name for name in layers if _ends(name, target)]
        fused = [
            name for name in experts if _ends(name, target) or _ends(name, OLD_NAMES.get(target, target))
        ]
        named = [
            name for name in routers if _ends(name, target) or _ends(name.removesuffix(".weight"), target)
        ]
        if not own + fused + named:
            known = sorted({name.split(".")[-1] for name in layers + experts})
            raise UserError(
                f"student.lora.targets: {type(lm).__name__} has nothing to adapt of the name {target!r}; it "
                f"has {', '.join(known[:SHOWN])}"
            )
        found.layers += own
        found.parameters += fused + named
    return Places(list(dict.fromkeys(found.layers)), list(dict.fromkeys(found.parameters)))


def _layers(lm: Any) -> Iterator[str]:
    """Linear layers that text goes through, except routers."""
    from transformers.pytorch_utils import Conv1D

    inside, head = {id(m) for m in backbone(lm).modules()}, lm.get_output_embeddings()
    mixers = [name for name, module in lm.named_modules() if "A_log" in module._parameters]
    for name, module in lm.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head or id(module) not in inside:
            continue
        if _is_router(lm, name) or not _maps_plainly(module):
            continue
        if not any(name.startswith(f"{mixer}.") for mixer in mixers) or name.endswith("in_proj"):
            yield name


@torch.no_grad()
def _maps_plainly(module: Any) -> bool:
    """Whether a layer with a forward of its own still computes `x W'` and a bias; a grouped layer does
    not.
    """
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    own = {name: torch.randn(parameter.shape) for name, parameter in module.named_parameters()}
    x = torch.randn(1, ROWS, module.in_features)
    try:
        out = torch.func.functional_call(module, own, (x,))
    except RuntimeError:
        return False
    expected = nn.functional.linear(x, own["weight"], own.get("bias"))
    return (
        isinstance(out, torch.Tensor)
        and out.shape == expected.shape
        and torch.allclose(out, expected, atol=1e-3)
    )


def _experts(lm: Any) -> Iterator[str]:
    """Parameters `(experts, ...)` that hold all experts' weights of a layer."""
    inside = {id(m) for m in backbone(lm).modules()}
    for name, module in lm.named_modules():
        if id(module) in inside and "experts" in f"{name}.{type(module).__name__}".lower():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield f"{name}.{own}"


def _routers(lm: Any) -> Iterator[str]:
    for name, parameter in lm.named_parameters():
        if parameter.dim() == 2 and _is_router(lm, name.rpartition(".")[0]):
            yield name


def _is_router(lm: Any, name: str) -> bool:
    """Whether a module of this name chooses experts: a gate or router beside them."""
    found = ROUTER.search(name)
    if found is None:
        return False
    beside = lm.get_submodule(name[: found.start()])
    return any(
        "experts" in f"{own}.{type(module).__name__}".lower() for own, module in beside.named_children()
    )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
