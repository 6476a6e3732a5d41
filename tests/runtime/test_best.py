"""Keeping the best student, and patience."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, Fopd, check_accounts, lines, metrics, small_recipe, summary
from safetensors.torch import load_file

from fopd_cli.errors import UserError
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.memory.weights import WeightChannel


def evaluations(**figures: float | None) -> dict[str, dict[str, Any]]:
    """By version, `v4=0.5`."""
    return {version[1:]: {"score": value, "kl": value} for version, value in figures.items()}


def channel(version: int) -> WeightChannel:
    made = WeightChannel.create([("a", (2, 3), torch.bfloat16), ("b", (5,), torch.bfloat16)])
    made.write(version, iter([("a", torch.full((2, 3), float(version))), ("b", torch.arange(5.0))]))
    return made


def test_the_best_is_the_highest_score_or_the_lowest_kl_and_the_earliest_of_equals(tmp_path: Path) -> None:
    found = evaluations(v0=0.3, v2=0.1, v10=0.5, v12=0.5, v14=float("nan"), v16=None)
    assert Best("score", 0, tmp_path).of(found) == 10
    assert Best("kl", 0, tmp_path).of(found) == 2
    assert Best("score", 0, tmp_path).of(evaluations(v0=float("nan"))) is None


def test_patience_counts_evaluations_without_a_new_best(tmp_path: Path) -> None:
    best = Best("kl", 2, tmp_path)
    assert best.out_of_patience(evaluations(v0=0.3, v2=0.2, v4=0.25)) is None
    assert best.out_of_patience(evaluations(v0=0.3, v2=0.2, v4=0.25, v6=0.1)) is None
    why = best.out_of_patience(evaluations(v0=0.3, v2=0.2, v4=0.25, v6=0.2))
    assert why == (
        "the KL to the teacher has not become better than 0.2 (step 2) in 2 evaluations "
        "(eval.patience); the run ends early"
    )
    assert Best("kl", 0, tmp_path).out_of_patience(evaluations(v0=0.1, v2=1, v4=1, v6=1)) is None


def test_weights_are_kept_as_published_and_as_long_as_a_checkpoint_may_go_back_to_them(
    tmp_path: Path,
) -> None:
    best = Best("score", 0, tmp_path / "best")
    for version in (0, 2, 4):
        best.keep(version, channel(version))
    tensors = load_file(best.file(2))
    assert torch.equal(tensors["a"], torch.full((2, 3), 2.0, dtype=torch.bfloat16))
    now = evaluations(v0=0.1, v2=0.3, v4=0.4)
    best.tidy([now, evaluations(v0=0.1, v2=0.3)])  # a checkpoint that does not know version 4
    assert best.kept() == [2, 4]
    assert best.of_kept(now) == 4
    assert best.of_kept(evaluations(v0=0.9, v2=0.3)) == 2  # version 0 was better; its weights are gone
    best.tidy([now])
    assert best.kept() == [4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.patience=2"], "eval.patience: needs to know what is best"),
        (["eval.keep_best=kl"], "no evaluations to choose from"),
        (["eval.keep_best=KL", "eval.every=2"], "did you mean 'kl'"),
        (
            ["eval.keep_best=score", "eval.every=2", 'task={"name": "chat", "train": "x.jsonl"}'],
            "nothing is graded in this task",
        ),
    ],
)
def test_what_cannot_be_chosen_by(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY)))
    with pytest.raises(UserError, match=message):
        load_recipe(path, overrides)


@pytest.mark.slow
def test_a_run_that_only_gets_worse_ends_early_with_its_best_student(fopd: Fopd, pair: Path) -> None:
    """At this rate the KL is best before step 1: student/ is the initial student, and a resume continues."""
    recipe = small_recipe(
        pair,
        learner={"steps": 20, "lr": 0.5, "clip": 0},
        eval={"every": 1, "keep_best": "kl", "patience": 2},
        schedule={"max_lag": 1},
    )
    run = fopd.run(recipe)
    kls = {r["step"]: r["kl"] for r in metrics(run) if r["kind"] == "eval"}
    best = min(kls, key=lambda step: (kls[step], step))
    found = summary(run)
    assert (found["student_step"], found["student_chosen_by"]) == (best, "kl")
    assert found["steps"] == max(kls) == best + 2 < 20
    assert re.match(
        rf"the KL to the teacher has not become better than .* \(step {best}\) in 2 evaluations",
        found["stopped_early"],
    )
    assert [w["text"] for w in lines(run / "warnings.jsonl") if "patience" in w["text"]] == [
        found["stopped_early"]
    ]
    assert json.loads((run / "student" / "fopd.json").read_text())["step"] == best
    check_accounts(run)
    assert json.loads(fopd("eval", run).out)["score"] == next(
        r["score"] for r in metrics(run) if r["kind"] == "eval" and r["step"] == best
    )
    if best == 0:
        student, start = (load_file(p / "model.safetensors") for p in (run / "student", pair / "student"))
        assert all(torch.equal(student[name], tensor) for name, tensor in start.items())
    assert "finished" in fopd("runs", run).out
    exported = fopd.folder / "exported"
    assert f"student of step {best}" in fopd("export", run, exported).out
    assert (exported / "model.safetensors").read_bytes() == (
        run / "student" / "model.safetensors"
    ).read_bytes()
    last = fopd("export", run, fopd.folder / "last", "--step", str(found["steps"])).out
    assert f"student of step {found['steps']}" in last
