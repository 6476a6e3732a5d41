"""Blocks of memory that are read as they were, while others write over them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fopd_cli.runtime.memory import held
from fopd_cli.runtime.memory.held import Held


def blocks(count: int, aside: int = 1 << 20) -> tuple[np.ndarray, Held]:
    """Memory of `count` blocks of ten bytes each, that hold their own number."""
    memory = np.repeat(np.arange(count, dtype=np.uint8), 10)
    return memory, Held(memory, {key: (10 * key, 10) for key in range(count)}, aside)


def test_a_block_is_as_it_was_though_it_changes_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "CHUNK", 4)
    memory, found = blocks(3)
    read = []
    for piece in found.read(1):
        read.append(piece.tolist())
        found.let_write(8, 5)  # the end of one, the beginning of the next
        memory[8:13] = 9
        found.let_write(16, 1)
        memory[16] = 9
    assert read == [[1] * 4, [1] * 4, [1] * 2]
    assert [x for piece in found.read(0) for x in piece.tolist()] == [0] * 10
    assert found.sizes == {2: 10}


def test_only_what_is_not_read_yet_is_copied() -> None:
    memory, found = blocks(3, aside=10)
    list(found.read(0))
    found.let_write(0, 10)
    found.let_write(10, 10)
    memory[:20] = 9
    assert [p.tolist() for p in found.read(1)] == [[1] * 10]
    found.let_write(20, 10)  # there is room again
    found.let_go()
    assert not found.sizes


@pytest.mark.parametrize("read", [True, False])
def test_who_would_have_too_much_copied_waits_for_the_disk(read: bool) -> None:
    """Until the block is read, or nobody will read it any more."""
    memory, found = blocks(2, aside=15)
    found.let_write(0, 10)
    done = threading.Event()

    def write() -> None:
        found.let_write(10, 10)
        memory[10:] = 9
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    if read:
        assert [p.tolist() for p in found.read(1)] == [[1] * 10], "not written over before"
    else:
        found.let_go()
    assert done.wait(30)
    thread.join()
