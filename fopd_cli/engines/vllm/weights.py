"""The receiving end of live weight updates inside vLLM: its weight-transfer API over our transports.

It is driven by the same three calls as vLLM's NCCL and IPC engines (start, update, finish). vLLM's layerwise
reload takes weights in checkpoint format and repacks, fuses and shards them as it did at start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fopd_cli.engines.models.checkpoint_format import in_checkpoint_format
from fopd_cli.engines.protocols import Spread


@dataclass
class WithAliases:
    """Weights under the checkpoint's names, with tied ones repeated under their other names (picklable if
    `weights` is).

    vLLM may keep its own copy of a tied head, which would stay at the old weights unless it is named.
    """

    weights: Iterable[tuple[str, Tensor]]
    aliases: dict[str, str]  # other name -> published name
    model: str  # the student's directory or hub id

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return in_checkpoint_format(self.model, self._named())

    def within(self, rank: int, world: int, device: torch.device) -> WithAliases:
        """As one of `world` processes that all load them gets them."""
        if not isinstance(self.weights, Spread):
            return self
        return replace(self, weights=self.weights.within(rank, world, device))

    def known_to(self, model: Any) -> WithAliases:
        """Drop names of modules that vLLM's model does not have; some models have no separate tied head."""
        modules = {name.rpartition(".")[2] for name, _ in model.named_modules(remove_duplicate=False)}
        aliases = {other: name for other, name in self.aliases.items() if other.split(".")[-2] in modules}
        return replace(self, aliases=aliases)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        others = {name: other for other, name in self.aliases.items()}
        for name, tensor in self.weights:
            yield name, tensor
            if name in others:
                yield others[name], tensor


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    weights: Iterable[tuple[str, Tensor]]


class LiveWeightEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads one whole version per update. Raises if a parameter of the model got no new value."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self._expected = {name for name, _ in self.model.named_parameters()}
        _repack_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        model: Any = self.model
        weights = update_info.weights
        if isinstance(weights, WithAliases):
            parallel = self.parallel_config
            rank, world = parallel.rank, parallel.tensor_parallel_size
            weights = weights.known_to(model).within(rank, world, self.device)
        loaded = model.load_weights(_on(self.device, weights))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the slot may be overwritten after this
        missing = self._expected - loaded if loaded is not None else set()
        if missing:
            raise RuntimeError(
                f"the update lacks weights of {sorted(missing)[:3]}; the engine is of no use any more"
            )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def _on(device: torch.device, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Queue each copy to the device, so that vLLM's loaders, which copy in place, never wait for the bus."""
    for name, tensor in weights:
        yield name, tensor.to(device, non_blocking=True)


def _repack_experts(model: Any) -> None:
    """Make vLLM rebuild its CPU kernels for experts from the new weights.

    If a kernel exists, vLLM assumes that the update is already packed and skips packing (CUDA's kernels need
    none). Log-probs would then silently be off by nats.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        weight = getattr(module, "w13_weight", None)
        if weight is not None and not weight.is_cuda and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None
