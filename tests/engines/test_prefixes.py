"""Which tokens of a row are shared."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fopd_cli.engines.tokens.prefixes import WORTH, SharedRow


def ids(*parts: str) -> np.ndarray:
    return np.frombuffer("".join(parts).encode(), dtype=np.uint8).astype(np.int32)


SYSTEM, PROMPT = "s" * WORTH, "p" * WORTH


def test_a_system_message_and_a_prompt_are_laid_out_once() -> None:
    row = SharedRow.of([ids(SYSTEM, PROMPT, "one"), ids(SYSTEM, PROMPT, "two"), ids(SYSTEM, "q")])
    assert ["".join(map(chr, t)) for t in row.tokens] == [SYSTEM, PROMPT, "one", "two", "q"]
    assert row.offsets == [0, WORTH, 2 * WORTH, 2 * WORTH, WORTH]
    assert row.prefixes == [(), (0,), (0, 1), (0, 1), (0,)]
    assert row.paths == [(0, 1, 2), (0, 1, 3), (0, 4)]


def test_what_is_short_is_not_worth_it() -> None:
    row = SharedRow.of([ids("s" * (WORTH - 1), "a"), ids("s" * (WORTH - 1), "b")])
    assert row.paths == [(0,), (1,)]


SEQUENCE = st.lists(st.sampled_from([SYSTEM, PROMPT, "a", "bc"]), min_size=1, max_size=5)


@given(st.lists(SEQUENCE, min_size=1, max_size=8))
def test_every_sequence_is_found_again(parts: list[list[str]]) -> None:
    sequences = [ids(*p) for p in parts]
    row = SharedRow.of(sequences)
    flat = np.concatenate(row.tokens)
    for sequence, places, path in zip(sequences, row.places(), row.paths, strict=True):
        assert flat[places].tolist() == sequence.tolist()
        assert row.prefixes[path[-1]] == path[:-1]
        reached = 0
        for segment in path:
            assert row.offsets[segment] == reached
            reached += len(row.tokens[segment])
    assert len(flat) <= sum(map(len, sequences))
