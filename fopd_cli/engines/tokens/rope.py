"""Rotary embeddings that depend on how long a sequence is: longrope (Phi-3-128k, Phi-4-mini) and dynamic NTK.

transformers takes the longest position of the whole batch for the length of every sequence in it. A short
sample's hidden states would then depend on who happens to be in its micro-batch. Here each sequence has the
factors of its own length, as if it were alone; while a response grows, that is its length so far.

vLLM chooses once, by the longest sequence that it was told to expect (`max_model_len`, which is the run's),
and not at all for dynamic NTK. Where it samples, learner and teacher do the same: `by_sequence(lm, longest)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def by_length(config: Any) -> bool:
    """Whether the model's rotary embedding depends on the length of a sequence."""
    return any(True for _ in _kinds(config))


def kinds(config: Any) -> set[str]:
    """Of "longrope" and "dynamic", those that the model has."""
    return {kind for kind, _ in _kinds(config)}


def switch(config: Any) -> int | None:
    """Tokens up to which a sequence has the factors of short ones; None: they depend on no length."""
    ends = [end for _, end in _kinds(config)]
    return min(ends) if ends else None


def factors_of(config: Any, length: int) -> tuple[int, ...]:
    """Equal for two lengths exactly if their factors are."""
    return tuple(_factors(kind, end, length) for kind, end in _kinds(config))


def by_sequence(lm: Any, longest: int | None = None) -> None:
    """Give every sequence of a batch or packed row the factors of its own length, or all of them those of
    `longest`.

    Changes nothing for other models. May be called again with another `longest`.
    """
    for module in lm.modules():
        if _types(getattr(module, "rope_type", None)) & {"longrope", "dynamic"}:
            known = getattr(module.forward, "__self__", None)
            plain = known.plain if isinstance(known, _BySequence) else module.forward
            module.forward = _BySequence(module, plain, lm.config, longest).forward


def _kinds(config: Any) -> Iterator[tuple[str, int]]:
    """(kind, tokens up to which a sequence is short) of each rope whose factors depend on the length."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    for rope in nested or [parameters]:
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            yield "longrope", int(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            yield "dynamic", int(text.max_position_embeddings)


def _types(rope_type: Any) -> set[str]:
    named = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return {"dynamic" if "dynamic" in kind else kind for kind in named if isinstance(kind, str)}


def _factors(kind: str, end: int, length: int) -> int:
    return int(length > end) if kind == "longrope" else max(length, end)


class _BySequence:
    """Calls a rotary module once for each set of factors that a batch needs, and gives each position its
    own.
    """

    def __init__(self, module: Any, plain: Callable[..., Any], config: Any, longest: int | None) -> None:
        self.module, self.plain, self.config, self.longest = module, plain, config, longest

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own: `position_ids` `(rows, tokens)`, results `(rows, tokens, width)`."""
        if self.longest is not None:
            return self._at(self.longest, x, position_ids, args, kwargs)
        lengths = _lengths(position_ids)
        factors = {length: factors_of(self.config, length) for length in lengths.unique().tolist()}
        out: Any = None
        for wanted in dict.fromkeys(factors.values()):
            own = [length for length, found in factors.items() if found == wanted]
            made = self._at(max(own), x, position_ids.clamp(max=max(own) - 1), args, kwargs)
            here = torch.isin(lengths, torch.tensor(own, device=lengths.device))[..., None]
            out = made if out is None else _where(here, made, out)
        return out

    def _at(self, length: int, x: Tensor, position_ids: Tensor, args: Any, kwargs: Any) -> Any:
        """As if the longest sequence had this length: one more position says so, and is cut off again."""
        self._forget()
        last = position_ids.new_full((position_ids.shape[0], 1), length - 1)
        made = self.plain(x, torch.cat([position_ids, last], -1), *args, **kwargs)
        return tuple(m[:, :-1] for m in made) if isinstance(made, tuple) else made[:, :-1]

    def _forget(self) -> None:
        """Dynamic NTK keeps the factors of the longest sequence seen; back to what the module began with."""
        for name in [n for n in vars(self.module) if n.endswith("max_seq_len_cached")]:
            setattr(self.module, name, self.module.original_max_seq_len)
        held = {**self.module._buffers, **vars(self.module)}
        for name in [n for n in held if n.endswith("original_inv_freq")]:
            own = name.removesuffix("original_inv_freq") + "inv_freq"
            original = getattr(self.module, name)
            self.module.register_buffer(own, original.to(getattr(self.module, own).device), persistent=False)


def _lengths(position_ids: Tensor) -> Tensor:
    """int64 `(rows, tokens)`: of the sequence that each position belongs to. A new one begins where positions
    do not rise.
    """
    step = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1)
    pieces = (position_ids[:, :1] != 0).any() | ((step < 0) & (position_ids != 0)).any()
    if position_ids.shape[1] > 1 and bool(pieces):
        raise ValueError(
            "its rotary embedding depends on a sequence's length, which a piece of it does not tell"
        )
    begins = step <= 0  # a position that is repeated is padding
    sequence = begins.cumsum(-1)
    longest = torch.zeros_like(position_ids).scatter_reduce(-1, sequence, position_ids, "amax")
    return longest.gather(-1, sequence) + 1


def _where(here: Tensor, one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(torch.where(here, a, b) for a, b in zip(one, other, strict=True))
    return torch.where(here, one, other)
