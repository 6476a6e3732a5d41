"""Several named held-out sets: each has its own figures everywhere; one of them is the run's main set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SLOW, TINY, Fopd, lines, metrics, small_recipe, summary
from inprocess_kit import conducted

from fopd_cli import card
from fopd_cli.errors import UserError
from fopd_cli.evaluation import evaluate
from fopd_cli.inputs import Inputs, load_inputs
from fopd_cli.recipe import Recipe, changes, load_recipe
from fopd_cli.report.charts import charts
from fopd_cli.report.page import page
from fopd_cli.report.reading import read
from fopd_cli.report.tables import of_differences, of_runs
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.placement import place
from fopd_cli.samples import Rollout, SampleId, SampleStats
from fopd_cli.tasks import load_task
from fopd_cli.tasks.arithmetic import worked


def questions(path: Path, horizon: int, count: int) -> str:
    """Questions from the tiny pair's task, each with the whole response as its answer."""
    made = load_task("arithmetic", {"horizon": horizon, "train_prompts": count, "eval_prompts": 1})
    asked = [str(p.text) for p in made.prompts("train")]
    path.write_text("".join(json.dumps({"question": q, "answer": worked(q)}) + "\n" for q in asked))
    return path.name


def made(folder: Path, **changed: Any) -> dict[str, Any]:
    recipe = small_recipe(TINY, **{"learner": {"steps": 2}, "sampler": {"max_new_tokens": 20}, **changed})
    sets = {name: questions(folder / f"{name}.jsonl", n, 6) for name, n in (("short", 2), ("long", 4))}
    train = questions(folder / "train.jsonl", 3, 40)
    recipe["task"] = {"name": "math", "train": train, "eval": sets, "chat": False}
    return recipe


def loaded(folder: Path, *overrides: str, **changed: Any) -> Recipe:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made(folder, **changed), sort_keys=False))
    return load_recipe(folder / "recipe.yaml", overrides)


def inputs_of(folder: Path, *overrides: str) -> Inputs:
    recipe = loaded(folder, *overrides)
    return load_inputs(recipe, place(recipe, 0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    return conducted(loaded(folder), folder)


def test_every_set_has_its_own_figures_and_the_first_is_the_runs(run: Path) -> None:
    evaluations = [r for r in metrics(run) if r["kind"] == "eval"]
    assert [e["step"] for e in evaluations] == [0, 2]
    for record in evaluations:
        assert list(record["sets"]) == ["short", "long"]
        assert record["set"] == "short"
        own = record["sets"]["short"]
        assert {k: record[k] for k in own} == own
        assert own["kl"] != record["sets"]["long"]["kl"]
        assert [s["prompts"] for s in record["sets"].values()] == [6, 6]
    shown = [s["sample"] for s in lines(run / "samples.jsonl") if s["kind"] == "eval" and s["step"] == 2]
    assert shown == [f"eval/e0/p{p}/s0/a0" for p in (0, 1, 6, 7)]  # of each set


def test_fopd_eval_finds_for_each_set_what_the_run_found(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run / "recipe.yaml", ["eval.follow=long"])
    found = evaluate(str(TINY / "student"), recipe, tmp_path / "rows.jsonl")
    first = next(r for r in metrics(run) if r["kind"] == "eval")
    assert found["set"] == "long"
    for name, own in first["sets"].items():
        assert found["sets"][name]["score"] == pytest.approx(own["score"])
        assert found["sets"][name]["score_error"] == pytest.approx(own["score_error"])
    assert found["score"] == found["sets"]["long"]["score"]
    again = evaluate(str(TINY / "student"), load_recipe(run / "recipe.yaml"), tmp_path / "rows.jsonl")
    assert (again["set"], again["already_done"], again["sets"]) == ("short", 12, found["sets"])
    named: Any = recipe.task
    task = named.model_copy(update={"eval": dict(reversed(named.eval.items()))})
    with pytest.raises(UserError, match="of another model, task"):  # row 0 would be another prompt
        evaluate(str(TINY / "student"), recipe.model_copy(update={"task": task}), tmp_path / "rows.jsonl")


def test_reports_tables_and_the_card_have_each_set_by_name(run: Path) -> None:
    found = read(run)
    titles = {chart["title"]: chart for chart in charts([found])}
    last = found.evaluations[-1]["sets"]
    assert titles["KL to the teacher: long"]["series"][0]["y"][-1] == pytest.approx(
        last["long"]["kl"], rel=1e-4
    )
    assert titles["Score: short"]["series"][0]["y"][-1] == pytest.approx(last["short"]["score"], rel=1e-4)
    text = page([found])
    assert "By held-out set" in text
    assert "short (the run&#x27;s own)" in text or "short (the run's own)" in text
    table = of_runs(run)
    for name in ("short", "long"):
        assert f"on {name}" in table
        assert f"{last[name]['kl']:.4f}" in table
    difference = of_differences(run, run)
    assert "KL on long" in difference
    assert "+0.0000" in next(line for line in difference.splitlines() if line.startswith("KL on long"))
    written = card.text(found, 2)
    assert "These are of the held-out set short" in written
    assert f"| long | 6 | {last['long']['score']:.3f}" in written


def stats(kl: list[float], length: list[int]) -> SampleStats:
    n = len(kl)
    values = {name: np.ones(n) for name in SampleStats.__annotations__}
    return SampleStats(
        **{**values, "kl": np.array(kl), "length": np.array(length), "kl_quartiles": np.ones((n, 4))}
    )


def rollout(key: int) -> Rollout:
    return Rollout(key, np.arange(4), 2, np.ones(2, bool), np.zeros(2), [(0, 0, 2)], "stop")


def test_figures_by_set_against_plain_arithmetic() -> None:
    """Samples come back in any order, and a teacher's group may hold samples of two sets."""
    samples = [(SampleId("eval", 0, p, 0), float(p % 2), rollout(p)) for p in (3, 0, 2, 1)]
    record = records.evaluation(
        7, [stats([4.0, 1.0, 3.0], [1, 1, 3]), stats([2.0], [1])], samples, [{}] * 4, ["b", "a", "b", "a"]
    )
    assert record["set"] == "a"  # that of the first prompt
    assert record["kl"] == record["sets"]["a"]["kl"] == pytest.approx((1 + 2) / 2)
    assert record["sets"]["b"]["kl"] == pytest.approx((4 * 1 + 3 * 3) / 4)
    assert record["sets"]["b"]["score"] == 0.5
    assert record["sets"]["b"]["kl_error"] == pytest.approx(math.sqrt(0.5) / math.sqrt(2))
    scalars = records.evaluation_scalars(record)
    assert scalars["eval/b/kl"] == pytest.approx(3.25)
    assert scalars["eval/kl"] == pytest.approx(1.5)
    line = records.evaluation_line(record)
    assert line.startswith("held-out at step 7: a: score 0.500")
    assert "; b: score 0.500 ± 0.500 (2 prompts), KL to the teacher 3.2500" in line
    one = records.evaluation(7, [stats([1.0], [1])], samples[:1], [{}], ["only"])
    assert "set" not in one
    assert "sets" not in one


def test_the_best_is_that_of_the_set_that_is_followed(tmp_path: Path) -> None:
    kls = {0: (0.5, 0.9), 2: (0.3, 0.2), 4: (0.1, 0.6)}
    for follow, best in ((None, 4), ("a", 4), ("b", 2)):
        found = {}
        for step, (a, b) in kls.items():
            parts = [stats([a, b], [1, 1])]
            samples = [(SampleId("eval", 0, p, 0), 1.0, rollout(p)) for p in (0, 1)]
            found[str(step)] = records.evaluation(step, parts, samples, [{}] * 2, ["a", "b"], follow)
        assert Best("kl", 1, tmp_path).of(found) == best
        assert (Best("kl", 1, tmp_path).out_of_patience(found) is None) == (best == 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.follow=shrt", "eval.follow: there is no held-out set 'shrt'; did you mean 'short'"),
        ('task.eval={"a b": "short.jsonl"}', "'a b' cannot name a held-out set"),
        ("task.eval={}", "names no held-out set"),
        ("task.eval.short=gone.jsonl", "task.eval.short: there is no file"),
        ('task.eval={"only": "short.jsonl"}', None),
    ],
)
def test_sets_that_cannot_be(tmp_path: Path, override: str, message: str | None) -> None:
    overrides = [override.replace('"short.jsonl"', json.dumps(str(tmp_path / "short.jsonl")))]
    if message is None:
        assert inputs_of(tmp_path, *overrides).stream.held_out == []  # as if it had no name
        overrides, message = [*overrides, "eval.follow=only"], "one held-out set only"
    with pytest.raises(UserError, match=message):
        inputs_of(tmp_path, *overrides)


def test_columns_by_set_and_nothing_of_any_set_is_trained_on(tmp_path: Path) -> None:
    for name, question, count in (("a", "q", 4), ("b", "problem", 5), ("train", "question", 30)):
        rows = [{question: f"{i}+1?", "answer": str(i + 1)} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = load_task(
        "math",
        {
            "train": str(tmp_path / "train.jsonl"),
            "eval": {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b")},
            "eval_question": {"a": "q", "b": "problem"},
        },
    )
    held_out = task.prompts("eval")
    assert [p.held_out for p in held_out] == ["a"] * 4 + ["b"] * 5
    assert [p.index for p in held_out] == list(range(9))
    assert len(task.prompts("train")) == 25  # the five of b, of which four are in a, too


def test_a_resume_cannot_follow_another_set(tmp_path: Path) -> None:
    first, other = loaded(tmp_path), loaded(tmp_path, "eval.follow=long")
    assert changes.refused(first, other) == ["eval.follow"]


@SLOW
def test_a_run_keeps_the_best_by_the_set_that_it_follows(fopd: Fopd) -> None:
    recipe = made(fopd.folder, eval={"every": 1, "keep_best": "kl", "follow": "long"})
    run = fopd.run(recipe)
    kls = {r["step"]: r["sets"]["long"]["kl"] for r in metrics(run) if r["kind"] == "eval"}
    found = summary(run)
    assert found["student_step"] == min(kls, key=lambda step: (kls[step], step))
    assert found["set"] == "long"
    assert found["kl_last"] == found["sets"]["long"]["kl_last"] == pytest.approx(kls[2])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert board.Scalars("eval/long/kl")[-1].value == pytest.approx(kls[2], rel=1e-5)
    assert board.Scalars("eval/kl")[-1].value == pytest.approx(kls[2], rel=1e-5)
