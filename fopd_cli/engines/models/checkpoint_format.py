"""Converts weights from transformers' names and shapes to a checkpoint's.

transformers 5 fuses the experts of a mixture into one parameter when it loads a checkpoint, and splits them
again when it saves one. vLLM reads checkpoints, so an update is split as for saving, one tensor at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fopd_cli.engines.models import hf


def in_checkpoint_format(model: str, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names in this model's files; unchanged if those are the same."""
    if not converts(model):
        yield from weights
        return
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in weights:
        yield from revert_weight_conversion(_empty(model), {name: tensor}).items()


@functools.cache
def converts(model: str) -> bool:
    """Whether transformers names or shapes anything differently from the files."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(_empty(model), add_legacy=False))


@functools.cache
def _empty(model: str) -> Any:
    return hf.empty_model(hf.load_config(model, "student.model"))
