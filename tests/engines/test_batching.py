"""Grouping of samples for forward passes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fopd_cli.engines.tokens.batching import balanced_shares, by_token_budget

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 400), st.booleans())
def test_budget_is_kept_and_nothing_is_lost(lengths: list[int], budget: int, packed: bool) -> None:
    groups = by_token_budget(lengths, budget, packed)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[i] for i in group]
        assert len(group) == 1 or (sum(own) if packed else len(group) * max(own)) <= budget


@given(LENGTHS, st.integers(1, 400))
def test_packed_groups_are_filled(lengths: list[int], budget: int) -> None:
    """No two groups could have been one."""
    sizes = sorted(sum(lengths[i] for i in g) for g in by_token_budget(lengths, budget, True))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


@given(LENGTHS, st.integers(1, 5), st.sampled_from([1, 2]))
def test_shares_are_balanced(lengths: list[int], ranks: int, power: int) -> None:
    shares = balanced_shares(lengths, ranks, power)
    assert sorted(i for s in shares for i in s) == list(range(len(lengths)))
    cost = [sum(lengths[i] ** power for i in share) for share in shares]
    assert max(cost) - min(cost) <= max(n**power for n in lengths)
