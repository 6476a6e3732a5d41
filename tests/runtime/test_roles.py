"""What each rank makes of a command that all get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_placement import recipe

from fopd_cli.runtime.build import Setup
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew import roles
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.transport import Shared
from fopd_cli.samples import Rollout, TargetSpec, TeacherTargets


class Lengths:
    """A teacher whose judgement of every token is how many tokens there are."""

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        for rollout, target in zip(rollouts, targets, strict=True):
            assert target.logprobs is not None
            target.logprobs.fill_(len(rollout.token_ids))


def test_teacher_ranks_share_samples_by_their_tokens_and_fill_all_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By number of samples, or by squared lengths, one rank would have 60 tokens more."""
    monkeypatch.setattr(roles, "build_teacher", lambda *_: Lengths())
    lengths, ranks, most = [100, 50, 50, 30, 30], 2, 128
    spec = TargetSpec("sampled", 1, torch.float32)
    arena = torch.zeros(len(lengths) * spec.nbytes(most), dtype=torch.uint8)
    weights = Shared(WeightChannel.create([]))
    setup = Setup(recipe(tmp_path), 260, (spec,), (None,), most, most, arena, weights, tmp_path / "r")
    rollouts = [
        Rollout(i, np.zeros(n, np.int32), 4, np.ones(n - 4, bool), np.zeros(n - 4, np.float32), [], "stop")
        for i, n in enumerate(lengths)
    ]
    regions = [m.Region(i * spec.nbytes(most), r.response_length) for i, r in enumerate(rollouts)]
    spans = []
    for rank in range(ranks):
        teacher = roles.Teaching(WorkerSpec("teacher", rank, ranks, (), 1), setup, lambda: None)
        answer = teacher.do(m.ScoreCommand(rollouts, regions))
        assert isinstance(answer, m.Scored)
        assert answer.keys == list(range(len(lengths)))
        spans.append(answer.span)
    assert [s.args["tokens"] for s in spans] == [130, 130]
    assert sum(s.args["samples"] for s in spans) == len(lengths)
    for region, length in zip(regions, lengths, strict=True):
        (written,) = roles._targets(setup, [region])
        assert written.logprobs.tolist() == [length] * region.positions
