"""Top-k log-probs from engines that do not know where the shared vocabulary ends."""

from __future__ import annotations

import torch
from torch import Tensor


def first_k(ids: Tensor, logprobs: Tensor, vocab: int, k: int) -> tuple[Tensor, Tensor]:
    """Of each row's candidates `(n, k + spare)`, the k likeliest below `vocab`: log-probs and ids `(n, k)`.

    Ids from `vocab` on are padding of the teacher's vocabulary. Raises if a row has fewer than k real ones.
    """
    order = logprobs.masked_fill(ids >= vocab, -float("inf")).argsort(stable=True, dim=-1, descending=True)[
        :, :k
    ]
    top = ids.gather(-1, order)
    if (top >= vocab).any():
        raise RuntimeError(
            f"the teacher's top tokens are padding (ids from {vocab} on); it does not fit this tokenizer"
        )
    return logprobs.gather(-1, order), top


def log_shared(ids: Tensor, logprobs: Tensor, vocab: int) -> Tensor:
    """Log of the probability below `vocab`, `(n,)`, as far as candidates `(n, k)` tell: what log-probs are
    taken off by to be those of the shared vocabulary.
    """
    padding = torch.where(ids >= vocab, logprobs.exp(), 0.0).sum(-1)
    return torch.log1p(-padding.clamp(max=1 - torch.finfo(logprobs.dtype).eps))
