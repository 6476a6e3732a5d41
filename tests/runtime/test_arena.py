"""Shared memory: the targets' allocator and the weights' double buffer."""

from __future__ import annotations

import random

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from fopd_cli.runtime.memory.arena import Arena, targets_at
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.samples import TargetSpec


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_blocks_never_overlap_and_all_memory_comes_back(seed: int) -> None:
    rng, arena, held = random.Random(seed), Arena(64 * 100), {}
    for _ in range(200):
        if held and rng.random() < 0.45:
            arena.free(held_offset := rng.choice(list(held)))
            del held[held_offset]
        else:
            size = rng.randrange(1, 900)
            offset = arena.allocate(size)
            if offset is not None:
                assert offset + size <= arena.nbytes
                assert all(offset >= o + s or offset + size <= o for o, s in held.items())
                held[offset] = size
    for offset in list(held):
        arena.free(offset)
    assert arena.used_bytes == 0
    assert arena.allocate(64 * 100) == 0


def test_full_arena_says_none() -> None:
    arena = Arena(128)
    assert arena.allocate(100) == 0
    assert arena.allocate(1) is None
    arena.free(0)
    assert arena.allocate(1) == 0


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_targets_are_views_with_the_promised_shapes(kind: str) -> None:
    spec = TargetSpec(kind, 5, torch.bfloat16)
    arena = Arena(4096)
    offset = arena.allocate(spec.nbytes(7))
    first, again = (targets_at(arena.memory, offset, spec, 7) for _ in range(2))
    for name, dtype, shape in spec.fields(7):
        view = getattr(first, name)
        assert (view.dtype, tuple(view.shape)) == (dtype, shape)
        view.fill_(3)
        assert (getattr(again, name) == 3).all()


LAYOUT = [("a", (3, 5), torch.bfloat16), ("b", (7,), torch.float32)]


def weights(value: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, value)) for name, shape, _ in LAYOUT]


def test_channel_keeps_two_versions() -> None:
    channel = WeightChannel.create(LAYOUT)
    channel.write(0, iter(weights(0.0)))
    channel.write(1, iter(weights(1.0)))
    for version in (0, 1):
        assert all((tensor == version).all() for _, tensor in channel.read(version))
    channel.write(2, iter(weights(2.0)))
    with pytest.raises(RuntimeError, match="version 0 were overwritten"):
        list(channel.read(0))


def test_a_half_written_version_is_never_read() -> None:
    channel = WeightChannel.create(LAYOUT)
    with pytest.raises(RuntimeError, match="lacks the weights"):
        channel.write(0, iter(weights(0.0)[:1]))
    with pytest.raises(RuntimeError, match="overwritten"):
        list(channel.read(0))


def _child(channel: WeightChannel, version: int) -> None:
    channel.write(version, iter(weights(float(version))))


def test_another_process_writes_what_this_one_reads() -> None:
    channel = WeightChannel.create(LAYOUT)
    process = mp.get_context("spawn").Process(target=_child, args=(channel, 5))
    process.start()
    process.join()
    assert all((tensor == 5).all() for _, tensor in channel.read(5))
