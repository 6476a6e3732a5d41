"""Weights as a checkpoint names them, from how transformers keeps them.

transformers 5 fuses the experts of a mixture into one parameter when it loads a checkpoint, and takes them
apart again when it saves one. vLLM reads checkpoints; so an update is taken apart like a saved one, a tensor
at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fopd_cli.engines.models import hf


def in_checkpoint_format(model: str, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the model in this directory under the names of its files; as they are where these are
    the same.
    """
    if not converts(model):
        yield from weights
        return
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in weights:
        yield from revert_weight_conversion(_empty(model), {name: tensor}).items()


@functools.cache
def converts(model: str) -> bool:
    """Whether transformers gives anything another name or shape than the files do."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(_empty(model), add_legacy=False))


@functools.cache
def _empty(model: str) -> Any:
    return hf.empty_model(hf.load_config(model, "student.model"))
