"""The sample buffer: one entry per sample. It returns memory, and a checkpoint restores it unchanged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fopd_cli.errors import UserError
from fopd_cli.runtime.buffer import Buffer
from fopd_cli.runtime.journal.buffer_file import load_buffer
from fopd_cli.runtime.journal.checkpoint import described
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.samples import Context, Rollout, TargetSpec

SPECS = (TargetSpec("sampled", 1, torch.float32), TargetSpec("hidden", 4, torch.float32))


def rollout(key: int, length: int = 3) -> Rollout:
    ids = np.arange(2 + length, dtype=np.int32) + 10 * key
    logprobs = np.full(length, -0.5, np.float32)
    return Rollout(key, ids, 2, np.ones(length, bool), logprobs, [(0, 0, length)], "stop")


def test_room_is_for_all_of_a_group_or_for_none() -> None:
    buffer = Buffer(SPECS, 3 * 64)  # three lines; a sample of either teacher takes one
    for key in range(4):
        buffer.add(rollout(key), teacher=key % 2)
    assert buffer.reserve((0, 1))
    assert not buffer.reserve((2, 3))
    assert buffer[2].region is None
    assert buffer.arena.used_bytes == 2 * 64
    buffer.forget(0)
    buffer.forget(0)  # the second one to forget it
    assert buffer.reserve((2, 3))
    assert 0 not in buffer
    assert len(buffer) == 3


def test_a_sample_whose_targets_are_given_up_is_judged_on_its_first_context_again() -> None:
    buffer = Buffer(SPECS, 64)
    entry = buffer.add(rollout(0), teacher=0)
    assert buffer.reserve((0,))
    entry.context = Context(np.array([9, 9, 2, 3, 4], np.int32), np.arange(2, 5))
    assert entry.judged(None).judged.token_ids.tolist() == [9, 9, 2, 3, 4]
    buffer.release(0)
    assert entry.judged(None).judged.token_ids.tolist() == [0, 1, 2, 3, 4]
    told = entry.judged(np.array([7, 7, 7], np.int32)).judged
    assert told.token_ids.tolist() == [7, 7, 7, 2, 3, 4]
    assert told.positions.tolist() == [3, 4, 5]


def test_a_checkpoint_brings_samples_back_with_their_targets_and_grades(tmp_path: Path) -> None:
    buffer = Buffer(SPECS, 1 << 10)
    for key in range(3):
        buffer.add(rollout(key, length=key + 1), teacher=1)
    buffer[1].grade, buffer[2].grade = 0.25, math.nan
    assert buffer.reserve((0, 1))
    written = targets_at(buffer.arena.memory, buffer[1].targets.offset, SPECS[1], 2, 1)
    assert written.hidden is not None
    written.hidden.copy_(torch.arange(8.0).view(2, 4))
    snapshot = buffer.snapshot([1, 2], [1])
    state = json.loads(json.dumps(snapshot.state))
    assert snapshot.write(tmp_path / "b") == described(tmp_path / "b"), "it was hashed on the way"

    again = Buffer(SPECS, 1 << 10)
    again.load(tmp_path / "b", state, {1: 1, 2: 1})
    assert sorted(again.entries) == [1, 2]
    found = targets_at(again.arena.memory, again[1].targets.offset, SPECS[1], 2, 1)
    assert torch.equal(found.hidden, written.hidden)
    assert again[1].score == 0.25
    assert math.isnan(again[2].score)
    assert again[2].region is None
    assert [e.key for e in again.ungraded()] == []
    with pytest.raises(UserError, match=r"teacher\.buffer_gb"):
        Buffer(SPECS, 0).load(tmp_path / "b", state, {1: 1, 2: 1})


def test_what_is_written_is_the_state_of_the_save_whatever_happens_before(tmp_path: Path) -> None:
    """The samples are consumed, their memory is given to others, and a teacher judges one of them again."""
    buffer = Buffer(SPECS, 3 * 64)  # three lines; a sample takes one
    for key in range(3):
        buffer.add(rollout(key), teacher=1)
    assert buffer.reserve(range(3))
    memory = buffer.arena.memory
    for key in range(3):
        memory[64 * key :][:64] = key + 1
    snapshot = buffer.snapshot([0, 1, 2], [0, 1, 2])
    buffer.forget(0)
    buffer.add(rollout(7), teacher=1)
    assert buffer.reserve([7]), "what is being saved takes no room"
    buffer.let_score_again(1)
    memory[:128] = 99
    buffer.forget(2)
    snapshot.write(tmp_path / "b")
    rollouts, targets = load_buffer(tmp_path / "b", json.loads(json.dumps(snapshot.state["rollouts"])))
    assert [r.token_ids.tolist() for r in rollouts] == [rollout(key).token_ids.tolist() for key in range(3)]
    assert {key: set(raw.tolist()) for key, raw in targets.items()} == {0: {1}, 1: {2}, 2: {3}}
    assert {len(raw) for raw in targets.values()} == {SPECS[1].nbytes(3)}
