"""How samples are grouped for a forward pass: micro-batches under a token budget, shares that balance the
ranks.

That a split into micro-batches or ranks changes no loss is the objective's doing.
"""

from __future__ import annotations

from collections.abc import Sequence


def by_token_budget(lengths: Sequence[int], budget: int, packed: bool) -> list[list[int]]:
    """Indices grouped so that the tokens of a group, padding included, stay within the budget; longest group
    first.

    A packed group counts its tokens, a padded one rows x longest row (and so wants similar lengths together).
    What is longer than the budget gets a group of its own. Deterministic: ties keep their order.
    """
    groups: list[list[int]] = []
    tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if packed:
            home = next((g for g, used in enumerate(tokens) if used + length <= budget), None)  # first fit
        else:
            home = (
                len(groups) - 1
                if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget
                else None
            )
        if home is None:
            groups.append([index])
            tokens.append(length)
        else:
            groups[home].append(index)
            tokens[home] += length
    return groups


def balanced_shares(lengths: Sequence[int], ranks: int, power: int = 2) -> list[list[int]]:
    """Indices for each rank, balancing the sum of squared lengths (attention's cost), or of another power (1:
    of tokens); each share in rising order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    cost = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(ranks), key=lambda r: (cost[r], len(shares[r]), r))
        shares[rank].append(index)
        cost[rank] += lengths[index] ** power
    return [sorted(share) for share in shares]
