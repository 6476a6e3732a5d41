"""LoRA students (peft): the base stays frozen, low-rank adapters learn.

What is exported, and normally published, is W + (alpha / rank) B A under the base's names, so samplers need
no adapters; vLLM can also take A and B only. There is no dropout: with it, the student that learns would not
be the one that sampled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fopd_cli.engines.learner.lora_targets import choose
from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.samples import seed_of

Named = Iterator[tuple[str, Tensor]]
ADAPTER = "default"  # peft's name for the only one


def add_adapters(
    lm: Any,
    rank: int,
    alpha: float,
    targets: Literal["all-linear"] | Sequence[str],
    seed: int,
    frozen_dtype: torch.dtype,
    router: bool = False,
) -> None:
    """Freeze the base, keep it in `frozen_dtype`, and give it adapters in fp32; B starts at 0, so nothing
    changes yet.

    A model without weights (on the meta device) gets adapters without values; see `initial`. `router`: the
    routers of a mixture of experts learn, too. Raises `UserError` for target names that the model does not
    have.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("student.lora: needs peft: pip install 'fopd[lora]'") from None
    wanted = choose(lm, targets, router)
    lm.requires_grad_(False)
    hf.cast(lm, frozen_dtype)
    # Under a parent without a configuration, peft takes these names unchanged. Otherwise it would translate a
    # mixture's names from those of older checkpoints, lose dense layers of the same name, and adapt routers
    # unasked.
    parent = nn.Module()
    parent.lm = lm
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warns that one of the two lists is empty
        try:
            inject_adapter_in_model(
                LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    target_modules=[f"lm.{n}" for n in wanted.layers],
                    target_parameters=[f"lm.{n}" for n in wanted.parameters],
                ),
                parent,
                ADAPTER,
            )
        except ValueError as error:
            raise UserError(f"student.lora.targets: {str(error).splitlines()[0]}") from None
    if hasattr(lm.get_output_embeddings(), "lora_A"):  # the losses take the head as one matrix
        raise UserError("student.lora.targets: the output head cannot have an adapter; leave its name out")
    values = initial(seed)
    for name, parameter in lm.named_parameters():
        if (value := values(name, parameter.shape)) is not None:
            parameter.data = parameter.data.float() if parameter.is_meta else value.to(parameter.device)


def initial(seed: int) -> Callable[[str, torch.Size], Tensor | None]:
    """What an adapter's matrix of this name and shape starts as, in fp32: B as 0, A uniform like peft's;
    None for what is no adapter's. The same seed gives the same matrix on every rank, whatever else that rank
    has made.
    """

    def values(name: str, shape: torch.Size) -> Tensor | None:
        if not is_adapter(name):
            return None
        if ".lora_B." in name:
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return values


def is_adapter(name: str) -> bool:
    """Whether a parameter with this name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def merged(lm: nn.Module, dtypes: Mapping[str, torch.dtype] = MappingProxyType({})) -> Named:
    """Every distinct weight, whole, under its Hugging Face name, with adapters added in; a model without any
    is unchanged.

    A collective if the weights are sharded. A shard whose dtype in `dtypes` is narrower is cast before it is
    gathered: the numbers are the same, and half of them travel.
    """
    for name, tensor, layer in base(lm):
        if layer is not None:
            yield name, whole(tensor).float() + _delta(layer)
        else:
            dtype = dtypes.get(name, tensor.dtype)
            yield name, whole(tensor.to(dtype) if dtype.itemsize < tensor.dtype.itemsize else tensor)


def base(lm: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """Every distinct weight that is no adapter, as it is held here, under its Hugging Face name, with the
    layer whose adapter changes it (None: nothing does).
    """
    layers = {_adapted(name, m): m for name, m in lm.named_modules() if hasattr(m, "lora_A")}
    seen: set[int] = set()
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not is_adapter(name):
            seen.add(id(tensor))
            own = _plain(name).replace(".base_layer", "")
            yield own, tensor, layers.get(own)


def _adapted(name: str, layer: Any) -> str:
    """The base's name for what an adapter adapts: a layer's weight, or one of the parameters of a module
    (fused experts).
    """
    return f"{_plain(name).replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def check_adapter_alone(lm: nn.Module, key: str) -> None:
    """Raise `UserError` if the adapters cannot be used without their base: those of fused experts have no
    common format.
    """
    for name, module in lm.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
            raise UserError(
                f"{key}: {_adapted(name, module)} is no layer of its own, and its adapter can only be "
                "merged; publish merged weights, or name other student.lora.targets"
            )


def adapters(lm: nn.Module) -> Named:
    """A and B of every adapted layer, whole, under peft's names. A collective if they are sharded."""
    for name, tensor in held_adapters(lm):
        yield name, whole(tensor)


def held_adapters(lm: nn.Module) -> Named:
    """The same as they are held here."""
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if is_adapter(name):
            yield "base_model.model." + _plain(name).replace(f".{ADAPTER}.", "."), tensor


def write_adapter(
    folder: Path, weights: Iterable[tuple[str, Tensor]], alpha: float, base: str | None = None
) -> None:
    """Write what `adapters` gave as a directory in peft's format; `base` is the model that they belong to."""
    from peft import LoraConfig

    tensors = {name: tensor.contiguous() for name, tensor in weights}
    config = LoraConfig(
        r=next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name),
        lora_alpha=alpha,
        target_modules=[name.split(".")[-3] for name in tensors],
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # peft's own `save_pretrained` writes sets in arbitrary order.
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True))


def _delta(layer: Any) -> Tensor:
    a, b = whole(layer.lora_A[ADAPTER].weight).float(), whole(layer.lora_B[ADAPTER].weight).float()
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        product = b @ a
        return (product.T if layer.fan_in_fan_out else product) * layer.scaling[ADAPTER]
    # peft's layout: A of all experts stacked, B's columns by rank and then by expert.
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
    product = torch.einsum("ore,eri->eoi", b, a) * layer.scaling[ADAPTER]
    return product if layer._did_swap_in_out_features else product.transpose(1, 2)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard (a collective), detached."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    # a single rank has all of it: no need to prepare a collective for every tensor
    return (tensor.to_local() if tensor.device_mesh.size() == 1 else tensor.full_tensor()).detach()
