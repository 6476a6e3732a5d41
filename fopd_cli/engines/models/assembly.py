"""Of which tensors in the files each tensor of a model is made, and where in it they lie.

Most are one tensor under the same name. transformers 5 renames some and puts the experts of a mixture, which
files hold one by one, into one tensor: its own tables say which (`transformers.conversion_mapping`). Of these
we read renamings, stacks and what is put end to end; a model that needs anything else is None here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fopd_cli.engines.models import hf


@dataclass(frozen=True)
class Piece:
    """A tensor in the files, and the part of the model's tensor that it is."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    stacked: bool = False  # it lacks the model's first dimension, along which it is one of many

    def within(self, start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...] | None:
        """What this piece and a part of the model's tensor have in common, in the model's coordinates; None
        if nothing.
        """
        both = [
            slice(max(a, b), min(a + n, b + m))
            for a, n, b, m in zip(self.start, self.shape, start, shape, strict=True)
        ]
        return None if any(s.start >= s.stop for s in both) else tuple(both)


Pieces = dict[str, tuple[Piece, ...]]


def pieces_of(config: Any, there: Mapping[str, Tensor]) -> Pieces | None:
    """The pieces of each tensor of the model, by its name. `there`: the files' tensors, on the meta device.

    None if a tensor cannot be made of them so, or not in its shape.
    """
    lm: Any = hf.empty_model(config)
    tensors, tied = lm.state_dict(), hf.tied_names(config)
    made = _made(lm, tensors, there)
    if made is None:
        return None
    others: dict[str, list[str]] = defaultdict(list)
    for other, name in tied.items():
        others[name].append(other)
    found: Pieces = {}
    for name, tensor in tensors.items():
        own = next((made[n] for n in (name, *others[name]) if n in made), None)
        if own is not None and _shape(own) == tuple(tensor.shape):
            found[name] = own
        elif name not in tied:
            return None
    return found


def _made(lm: Any, tensors: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> Pieces | None:
    """What transformers would make of the files' tensors, by its names; None if that is not known here."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(lm, add_legacy=False)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings = [m for m in mapping if m not in converters]
    sources: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(there, key=dot_natural_key):  # expert 2 before expert 10
        target, pattern = rename_source_key(name, renamings, converters, lm.base_model_prefix, dict(tensors))
        sources[target][pattern].append(name)
    made: Pieces = {}
    for target, names in sources.items():
        if target not in tensors:
            continue  # what the architecture does not have: told when the files were checked
        converter = next((c for c in converters if set(names) <= set(c.source_patterns)), None)
        if converter is not None:
            parts = _joined(converter, names, there)
        elif set(names) == {None} and len(names[None]) == 1:
            parts = _whole(names[None][0], there)
        else:
            parts = None
        if parts is None:
            return None
        made[target] = parts
    return made


def _whole(name: str, there: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    shape = tuple(there[name].shape)
    return (Piece(name, (0,) * len(shape), shape),)


def _joined(
    converter: Any, names: Mapping[str | None, list[str]], there: Mapping[str, Tensor]
) -> tuple[Piece, ...] | None:
    """One tensor of each pattern, or a list that is stacked along a new first dimension (experts); then
    those of all patterns (gate and up) one after the other along a dimension.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    stacked = kinds[0] == (MergeModulelist, 0)
    match kinds[stacked:]:
        case []:
            along = 0
        case [(kind, int(along))] if kind is Concatenate and along >= stacked:
            pass
        case _:
            return None
    made, offset = [], 0
    for pattern in converter.source_patterns:
        own = names.get(pattern, [])
        shapes = {tuple(there[name].shape) for name in own}
        if len(shapes) != 1 or (len(own) > 1 and not stacked):
            return None
        shape = (*((1,) if stacked else ()), *shapes.pop())
        for number, name in enumerate(own):
            start = [0] * len(shape)
            start[along] = offset
            start[0] += number
            made.append(Piece(name, tuple(start), shape, stacked))
        offset += shape[along]
    return tuple(made)


def _shape(pieces: tuple[Piece, ...]) -> tuple[int, ...] | None:
    """The shape that they fill; None if they leave gaps."""
    ends = [[a + n for a, n in zip(p.start, p.shape, strict=True)] for p in pieces]
    shape = tuple(map(max, zip(*ends, strict=True)))
    filled = sum(torch.Size(p.shape).numel() for p in pieces)
    return shape if filled == torch.Size(shape).numel() else None
