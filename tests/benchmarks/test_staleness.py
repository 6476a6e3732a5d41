"""benchmarks/staleness.py: its tasks, its arithmetic, and a cut of it; never who wins."""

from __future__ import annotations

import asyncio
import csv
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import calibration
import horizons
import staleness
import staleness_regions as regions
import staleness_report as report


def test_the_experts_solve_the_tasks() -> None:
    recurrence, rng = horizons.Recurrence(), random.Random(0)
    assert horizons.continued("1230").startswith("136670")  # 0 + 1, 1 + 2, 3 + 3, 6 + 0, 6 + 1, 7 + 3
    prompt = recurrence.prompts("eval")[0]
    beginning, response = (text for text, _ in horizons.recurrence_solved(rng, 0))
    assert len(response.removesuffix("<eos>")) == horizons.FURTHER
    assert len(beginning) == 5
    assert recurrence.grade(prompt, horizons.continued((prompt.text or "")[:4])) == 1
    assert recurrence.grade(prompt, "0" * horizons.FURTHER) == 0
    assert not {p.text for p in recurrence.prompts("train")} & {p.text for p in recurrence.prompts("eval")}


def test_lookups_answer_letters_and_move_on_with_the_version() -> None:
    task = horizons.Lookups(drift=0.5)
    train, held_out = task.prompts("train")[0], task.prompts("eval")[0]

    async def episode(prompt: Any, now: int) -> list[str | None]:
        asking = task.episode(prompt, now)
        return [(await asking.observe(turn)).text for turn in ("a?", "b?", "a?", "1+2=3.3")]

    first = asyncio.run(episode(train, 0))
    assert first[0] == first[2]
    assert first[3] is None
    assert first == asyncio.run(episode(train, 0)), "seeded"
    assert any(asyncio.run(episode(train, now)) != first for now in range(1, 20))
    assert all(asyncio.run(episode(held_out, now)) == asyncio.run(episode(held_out, 0)) for now in range(20))
    assert task.grade(held_out, horizons.added(task.values(held_out, 0))[0]) == 1
    assert horizons.added([4, 7, 9]) == ("4+7=1,1+9=0.0", "0")


def test_ranks_and_their_correlation() -> None:
    assert calibration.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert calibration.spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert calibration.spearman([1, 2, 3], [3, 1, 2]) == pytest.approx(-0.5)  # 1 - 6 * 6 / (3 * 8)


def result(
    policy: str, lag: str, seed: int, curve: list[list[float]], seconds: float, collapsed: bool = False
) -> dict[str, Any]:
    zero = dict.fromkeys(("freshness", "lag_mean", "drift_roll", "drift_sup", "refreshes"), 0.0)
    return {
        "task": "short",
        "loss": "pg_cached",
        "policy": policy,
        "lag": lag,
        "seed": seed,
        "extra": (),
        "optimizer": "adamw",
        "kl": 0.5,
        "score": curve[-1][1],
        "curve": curve,
        "drop": 0.0,
        "collapsed": collapsed,
        "modelled_seconds": seconds,
        **zero,
    }


def test_a_row_is_what_its_runs_say() -> None:
    runs = [
        result("sync", "0", 0, [[0, 0.2], [10, 0.6], [20, 0.8]], 100),
        result("sync", "0", 1, [[0, 0.2], [10, 0.5], [20, 0.6]], 100),
        result("async", "8", 0, [[0, 0.2], [10, 0.7], [20, 0.3]], 50, collapsed=True),
        result("async", "8", 1, [[0, 0.2], [10, 0.1], [20, 0.1]], 50),
    ]
    sync, late = report.rows(runs)
    assert (sync["score"], sync["of_sync"], sync["of_gain"], sync["throughput"]) == pytest.approx(
        (0.7, 1, 1, 1)
    )
    assert sync["error"] == pytest.approx(0.1)  # sample deviation 0.1414 / sqrt(2)
    assert late["of_sync"] == pytest.approx(0.2 / 0.7)
    assert late["of_gain"] == pytest.approx(0)
    assert late["throughput"] == pytest.approx(2)
    assert (late["collapsed"], late["seeds"]) == (1, 2)
    assert late["steps_to_90"] == float("inf"), "one of two seeds reaches 0.63"
    assert "never" in report.markdown([late])
    done = dict((policy, (steps, score)) for policy, steps, score in report.equal_time(runs))
    assert done["async"] == pytest.approx((20, 0.2))
    assert done["sync"] == pytest.approx((10, 0.55)), "half of its steps"


def test_the_map_names_the_least_control_that_holds() -> None:
    def runs(rate: str, lag: str, policy: str, score: float, *extra: str) -> dict[str, Any]:
        run = result(policy, lag, 0, [[0, 0.2], [20, score]], 50)
        return {**run, "extra": (*((f"learner.lr={rate}",) if rate else ()), *extra)}

    rows = report.rows(
        [
            runs("", "0", "sync", 0.5),
            runs("", "8", "async", 0.0),
            runs("", "8", "fopd", 0.1),
            runs("", "8", "fopd", 0.2, "freshness.anchor=10"),
            runs("", "8", regions.STRONG[0], 0.49),
            runs("", "16", "async", 0.0),
            runs("", "16", regions.STRONG[1], 0.3),
            runs("1e-4", "0", "sync", 0.4),
            runs("1e-4", "8", "async", 0.39),
            runs("1e-4", "16", "async", 0.26),
            runs("1e-4", "16", "fopd", 0.392, "freshness.anchor=3"),
            runs("1e-4", "2", "async", 0.36),
            runs("3e-3", "8", "async", 0.3),  # its synchronous run is missing
            runs("", "8", "fopd", 0.5, "freshness.alpha=3"),  # of another study
        ]
    )
    found = {(p.rate, p.lag): p for p in regions.places(rows, "short", "pg_cached")}
    assert {key: place.needed for key, place in found.items()} == {
        (1e-4, 2): "nothing?",  # 90%, of one seed: 0.36 and 0.40 of 128 prompts
        (1e-4, 8): "nothing",
        (1e-4, 16): "the published method",
        (1e-3, 8): "a strong anchor",
        (1e-3, 16): "nothing holds",
    }
    assert found[1e-3, 8].published == pytest.approx({1: 0.2, 10: 0.4})
    assert found[1e-3, 8].ours == (pytest.approx(0.98), "pace 64")
    assert found[1e-3, 16].ours == (pytest.approx(0.6), "pace 160")
    # sqrt(0.36 0.64 + 0.81 0.4 0.6) / (0.4 sqrt(128))
    assert found[1e-4, 2].error(0.9) == pytest.approx(0.144, abs=1e-3)
    assert regions.paper(list(found.values())) is found[1e-4, 16]  # 65%
    assert "| 1e-4 | 16 | 1 | 0.40 | 65% | 98% (3) | - | - | the published method |" in regions.markdown(
        list(found.values())
    )


def test_every_cell_is_a_valid_recipe_of_its_own() -> None:
    from fopd_cli.recipe import load_recipe

    cells = [c for study in staleness.STUDIES.values() for c in study(0)]
    for cell in cells:
        load_recipe(staleness.RECIPES / f"{cell.task}.yaml", cell.overrides)


@pytest.mark.parametrize("lag", ["0", "2", "3", "4", "8", "16", "32", staleness.MIXED])
def test_two_recorded_policies_are_the_recipes_defaults(monkeypatch: pytest.MonkeyPatch, lag: str) -> None:
    """One up to lag 3, one beyond."""
    from fopd_cli.recipe import load_recipe
    from fopd_cli.runtime.build import learner_config

    def told(policy: str) -> Any:
        cell = staleness.Cell("short", "pg_cached", policy, lag, 0)
        recipe = load_recipe(staleness.RECIPES / "short.yaml", cell.overrides)
        config = learner_config(recipe, torch.float32, 1, 1)
        return replace(config, freshness=config.freshness.model_copy(update={"pace": None}))

    monkeypatch.setitem(staleness.POLICIES, "today", ["freshness.policy=fopd"])
    short = lag in ("0", "2", "3")
    assert (told("today") == told(staleness.DEFAULT)) is short
    assert (told("today") == told(staleness.PACE)) is not short


@pytest.mark.slow
def test_a_cut_of_the_benchmark(tmp_path: Path) -> None:
    """Three optimizer steps a cell: rows exist and add up, nothing is run twice, a seed gives the same
    figures.
    """
    command = [
        sys.executable,
        ROOT / "benchmarks" / "staleness.py",
        "--study",
        "headline",
        "--seeds",
        "1",
        "--steps",
        "3",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    wanted = [c.key for c in staleness.headline(0)]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(r["key"] for r in rows) == sorted(wanted)
    assert all(r["lag_max"] <= int(r["lag"]) for r in rows)
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(table) == len(wanted)
    assert all(int(r["collapsed"]) <= int(r["seeds"]) == 1 for r in table)
    for row in rows:
        (own,) = [r for r in table if r["policy"] == row["policy"]]
        assert float(own["score"]) == pytest.approx(row["score"])
    before = (tmp_path / "results.jsonl").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert done.stdout.splitlines()[-1] == again.stdout.splitlines()[-1]
    (cell,) = [c for c in staleness.headline(0) if c.policy == staleness.BEST]
    (first,) = [r for r in rows if r["key"] == cell.key]
    second = json.loads(json.dumps(staleness.measure(cell, staleness.settings((), 3))))
    assert {k: v for k, v in second.items() if k != "wall_seconds"} == {
        k: v for k, v in first.items() if k != "wall_seconds"
    }
