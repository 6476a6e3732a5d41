"""What turns hidden states into logits: the unembedding, and what an architecture does to its product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = cap tanh(u / cap), or u where there is no cap, with u = scale (hidden @ weight.T + bias).

    `weight` `(V, hidden)`, `bias` `(V,)` or None. Scale and cap are those of gemma, granite, cohere, nanochat
    and similar models; `engines/models/heads.py` finds them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, head: Head | Tensor) -> Head:
        """A bare weight is a head with nothing added."""
        return head if isinstance(head, Head) else cls(head)

    @property
    def vocab(self) -> int:
        """Number of rows."""
        return self.weight.shape[0]

    def first(self, vocab: int) -> Head:
        """The head for only the ids below `vocab`."""
        if vocab == self.vocab:
            return self  # even a full slice costs a copy of its gradient
        return replace(
            self, weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab]
        )

    def to(self, where: torch.device | torch.dtype | str) -> Head:
        """The tensors on another device or in another dtype."""
        return self.map(lambda tensor: tensor.to(where))

    def map(self, move: Callable[[Tensor], Tensor]) -> Head:
        """The head with other tensors, which `move` makes of these."""
        return replace(self, weight=move(self.weight), bias=None if self.bias is None else move(self.bias))

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `(n, V)` from hidden states `(n, hidden)`, which are cast to the head's dtype."""
        product = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        return soft_cap(product if self.scale == 1 else product * self.scale, self.cap)

    def uncapped(self, hidden: Tensor, out: Tensor) -> None:
        """u of hidden states `(n, hidden)`, written to `out` `(n, V)`, in its dtype. No autograd."""
        weight = self.weight.T
        same = hidden.dtype == weight.dtype == out.dtype
        if self.bias is None and self.scale == 1:
            if same:
                torch.mm(hidden, weight, out=out)
            else:
                out.copy_(hidden @ weight)
            return
        # The product's own epilogue adds and scales: no extra pass over the logits.
        into = out if same else torch.empty_like(out, dtype=weight.dtype)
        added, beta = (into, 0.0) if self.bias is None else (self.bias, self.scale)
        torch.addmm(added, hidden, weight, beta=beta, alpha=self.scale, out=into)
        if not same:
            out.copy_(into)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap tanh(logits / cap); the logits themselves where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def soft_cap_(logits: Tensor, cap: float | None) -> None:
    """The same in place."""
    if cap is not None:
        logits.div_(cap).tanh_().mul_(cap)
