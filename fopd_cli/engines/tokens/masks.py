"""What each kind of layer may attend to, kept as a rule until attention asks for it at some length.

transformers makes a mask for each kind of layer of a model (full, window, chunk, or a rule of the
architecture's own) and hands it to the attention function. For a packed row that would be a square of all its
tokens. So its mask interface is given a function that makes nothing: `MaskPattern` carries the rule to our
attention function, which asks for one sequence at a time. What it gets is what transformers makes for that
sequence alone, by the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_ROW: ContextVar[dict[str, Any] | None] = ContextVar("row", default=None)


@contextmanager
def laid_out(row: dict[str, Any]) -> Iterator[None]:
    """Within it, patterns know where the packed row's sequences lie: some architectures do not hand that on
    to their attention.
    """
    before = _ROW.set(row)
    try:
        yield
    finally:
        _ROW.reset(before)


class MaskPattern:
    """One kind of layer's mask. `make` is transformers' own function for the attention that the model has
    when it is not packed.

    `sees` is its `window` where it was made for a packed row.
    """

    def __init__(self, make: Callable[..., Tensor | None], rule: dict[str, Any]) -> None:
        self._make, self._rule = make, rule
        self.row = _ROW.get()
        self._made: dict[tuple[int, int], Tensor | None] = {}
        # Asked here, once, and not by each layer, whose compiled code could not look into a tensor.
        self.sees = None if self.row is None else self.window(self.row["max_length_q"])

    def of(self, queries: int, keys: int) -> Tensor | None:
        """`(1, 1, queries, keys)`, the queries being the last of the keys; None: plain causal attention of a
        square.
        """
        if (queries, keys) not in self._made:
            self._made[queries, keys] = self._make(
                batch_size=1, q_length=queries, kv_length=keys, q_offset=keys - queries, **self._rule
            )
        return self._made[queries, keys]

    def window(self, longest: int) -> int | None:
        """For kernels that know no masks: how many positions each one sees, its own included; 0: all before
        it.

        None: another rule, which only a mask can say. `longest` is how many positions a sequence can have.
        """
        local: int | None = self._rule.get("local_size")
        if not self._rule.get("allow_is_causal_skip", True):
            return None
        if local is None or longest <= local:
            return 0
        # A window and a chunk are both "local"; in the middle of the second chunk they differ, as all other
        # rules would.
        device = self._rule.get("device", "cpu")
        place = torch.arange(2 * local + 1, device=device)
        rows = torch.tensor([0, local - 1, local, local + local // 2, 2 * local], device=device)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        visible = self._rule["mask_function"](zero, zero, rows[:, None], place[None])
        distance = rows[:, None] - place[None]
        return local if torch.equal(visible, (distance >= 0) & (distance < local)) else None


def keep_rule(make: Callable[..., Tensor | None], /, **arguments: Any) -> MaskPattern:
    """For transformers' `AttentionMaskInterface`: the rule alone. The lengths are the packed row's and mean
    nothing.
    """
    row = ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "attention_mask")
    return MaskPattern(make, {name: value for name, value in arguments.items() if name not in row})
