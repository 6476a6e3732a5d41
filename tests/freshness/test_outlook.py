"""What is expected of a lag, by the kind of loss and control; and that it agrees with the committed runs."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, lines, small_recipe

from fopd_cli import outlook
from fopd_cli.recipe import Recipe, load_recipe

SAMPLED = {"support": "sampled", "advantage": "cached"}


def recipe(folder: Path, **changes: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY, **changes)))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("loss", "freshness", "kind"),
    [
        ({"support": "full"}, {"policy": "async"}, "exact"),
        (SAMPLED, {"policy": "fopd"}, "anchored"),
        (SAMPLED, {"policy": "fopd", "anchor": 1.0, "drift": "sampled"}, "bare"),
        (SAMPLED, {"policy": "async"}, "bare"),
        (SAMPLED, {"policy": "lag_weight"}, "bare"),
        (SAMPLED, {"policy": "trust"}, "trust"),
        ({**SAMPLED, "importance": True}, {"policy": "async"}, "ratio"),
    ],
)
def test_kinds(tmp_path: Path, loss: dict[str, Any], freshness: dict[str, Any], kind: str) -> None:
    found = outlook.outlook(recipe(tmp_path, loss=loss, freshness=freshness, schedule={"max_lag": 3}))
    assert found is not None
    assert (found.kind, found.measured) == (kind, 4)
    assert found.safe == (kind in ("exact", "anchored", "trust"))


def test_no_lag_no_outlook_and_one_beyond_what_was_tried_says_so(tmp_path: Path) -> None:
    assert outlook.outlook(recipe(tmp_path, schedule={"max_lag": 0})) is None
    far = outlook.outlook(
        recipe(tmp_path, loss={"support": "full"}, schedule={"max_lag": 20}, freshness={"xi": 0.01})
    )
    assert "at lag 16 (longer ones were not tried; here it is 20) exact losses" in str(far)


COMMITTED = {
    "trust": [("pg_cached", "trust")],
    "ratio": [("pg_ratio", "async")],
    "bare": [("pg_cached", "async")],
    "exact": [(loss, "async") for loss in ("reverse_kl", "forward_kl", "jsd", "topk")],
    "anchored": [("pg_cached", "fopd, defaults")],
}


@pytest.mark.parametrize("kind", COMMITTED)
def test_the_shares_are_those_of_the_committed_runs(kind: outlook.Kind) -> None:
    runs = [
        r
        for r in lines(ROOT / "docs" / "staleness" / "results.jsonl")
        if r["task"] == "short" and not r["extra"] and r["optimizer"] == "adamw"
    ]

    def score(loss: str, policy: str, lag: int) -> float:
        return statistics.fmean(
            r["score"] for r in runs if (r["loss"], r["policy"], r["lag"]) == (loss, policy, str(lag))
        )

    for lag in outlook.KEPT[kind]:
        rows = COMMITTED[kind]
        if kind == "anchored" and lag > 8:
            rows = [("pg_cached", "fopd, pace 160")]  # whose anchor is that of the defaults
        least = min(score(loss, p, lag) / score(loss, "sync", 0) for loss, p in rows)
        assert outlook.KEPT[kind][lag] == pytest.approx(least, abs=0.02)
