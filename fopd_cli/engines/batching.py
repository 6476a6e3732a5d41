"""How samples are grouped for a forward pass: micro-batches under a token budget, shares that balance the ranks.

Padding stands on the right. With a causal model no real token ever attends to it, so no mask is needed and padding
changes no loss; that a split into micro-batches or ranks changes none either is the objective's doing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= budget, similar lengths together; longest group first.

    A row longer than the budget gets a group of its own. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[groups[-1][0]] if groups else 0
        if groups and width * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def balanced_shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank, balancing the sum of squared lengths (attention's cost); each share in rising order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    cost = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(ranks), key=lambda r: (cost[r], len(shares[r]), r))
        shares[rank].append(index)
        cost[rank] += lengths[index] ** 2
    return [sorted(share) for share in shares]


def right_padded(rows: Sequence[np.ndarray]) -> Tensor:
    """int64 `(rows, longest)`; padding holds id 0, which no real position ever sees."""
    width = max(len(row) for row in rows)
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)
