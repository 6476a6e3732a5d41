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
        (SAMPLED, {"policy": "fopd"}, "constant"),
        (SAMPLED, {"policy": "fopd", "drift": "quadratic"}, "quadratic"),
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
    assert found.safe == (kind in ("exact", "constant", "quadratic", "trust"))


@pytest.mark.parametrize(("pace", "kind"), [("auto", "paced"), (None, "constant")])
def test_at_a_long_lag_it_matters_whether_the_anchor_weakens(
    tmp_path: Path, pace: str | None, kind: str
) -> None:
    freshness = {"policy": "fopd", "pace": pace, "xi": 0.01}
    found = outlook.outlook(recipe(tmp_path, loss=SAMPLED, freshness=freshness, schedule={"max_lag": 32}))
    assert found is not None
    assert (found.kind, found.measured, found.safe) == (kind, 32, kind == "paced")


def test_no_lag_no_outlook_and_one_beyond_what_was_tried_says_so(tmp_path: Path) -> None:
    assert outlook.outlook(recipe(tmp_path, schedule={"max_lag": 0})) is None
    far = outlook.outlook(
        recipe(tmp_path, loss={"support": "full"}, schedule={"max_lag": 20}, freshness={"xi": 0.01})
    )
    assert "at lag 16 (longer ones were not tried; here it is 20) exact losses" in str(far)


CONTROLLED = "fopd, defaults"  # of the first tables: a constant anchor of 20
SAMPLED_ANCHOR = ("freshness.drift=sampled", "freshness.anchor=30")
Row = tuple[str, str, tuple[str, ...]]  # loss, policy, further overrides
COMMITTED: dict[str, list[Row]] = {
    "trust": [("pg_cached", "trust", ())],
    "ratio": [("pg_ratio", "async", ())],
    "bare": [("pg_cached", "async", ())],
    "exact": [(loss, "async", ()) for loss in ("reverse_kl", "forward_kl", "jsd", "topk")],
    "constant": [("pg_cached", CONTROLLED, ())],
    "paced": [("pg_cached", "fopd, pace 64", ())],
    "quadratic": [("pg_cached", "fopd, quadratic anchor", ())],
    "sampled": [("pg_cached", "fopd, top-k anchor", SAMPLED_ANCHOR)],
}


def test_what_slower_students_kept_and_needed_is_told_beside_it(tmp_path: Path) -> None:
    bare = recipe(tmp_path, loss=SAMPLED, freshness={"policy": "async", "xi": 0.01}, schedule={"max_lag": 8})
    said = str(outlook.outlook(bare))
    assert "kept 0% of their synchronous score at learning rate 1e-3, 3% at 3e-4, 88% at 1e-4" in said
    assert (
        "least not shown to lose at lag 8: no control at 1e-4, f-OPD as published at 3e-4, a strong anchor"
        in said
    )
    exact = recipe(tmp_path, loss={"support": "full"}, schedule={"max_lag": 2})
    assert "at learning rate 1e-3; reverse KL needed none at 3e-4 and 1e-4 either" in str(
        outlook.outlook(exact)
    )


def test_the_rate_of_the_recipe_chooses_nothing(tmp_path: Path) -> None:
    """Rates do not carry over to its models."""
    one, other = (
        str(outlook.outlook(recipe(tmp_path, loss=SAMPLED, learner={"lr": lr}, schedule={"max_lag": 4})))
        for lr in (1e-6, 1e-3)
    )
    assert one == other


LOSSES = {"pg_cached": "policy gradient, cached", "reverse_kl": "reverse KL, full"}  # as the map names them


def test_what_a_real_pair_kept_is_that_of_the_committed_runs(tmp_path: Path) -> None:
    runs = [r for r in lines(ROOT / "docs" / "staleness" / "text-cpu" / "results.jsonl") if not r["extra"]]

    def kept(policy: str, lag: str) -> float:
        own = {
            r["seed"]: r for r in runs if (r["loss"], r["policy"], r["lag"]) == ("reverse_kl", policy, lag)
        }
        sync = [r for r in runs if (r["loss"], r["policy"]) == ("reverse_kl", "sync") and r["seed"] in own]
        assert len(sync) == len(own) > 0
        untrained = next(r["kl_on_answers_at_first"] for r in runs if "kl_on_answers_at_first" in r)
        gains = (untrained - statistics.fmean(r["kl_on_answers"] for r in of) for of in (own.values(), sync))
        return next(gains) / next(gains)

    for lag, share in outlook.REAL_PAIR.items():
        assert share == pytest.approx(kept("async", str(lag)), abs=0.006)
    held_back = kept(CONTROLLED, "<=8")
    assert held_back == pytest.approx(outlook.HELD_BACK, abs=0.006)
    exact = recipe(tmp_path, loss={"support": "full"}, schedule={"max_lag": 6})
    assert "96% of the gain on the teacher's answers after 40 steps at lag 8, and 100% up to" in str(
        outlook.outlook(exact)
    )


@pytest.mark.parametrize(("loss", "column"), [("pg_cached", None), ("reverse_kl", outlook.NOTHING)])
def test_the_least_that_held_is_that_of_the_map(loss: str, column: str | None) -> None:
    """docs/staleness/regions.md, made from the committed runs; a question mark there: it is not shown."""
    names = {
        "nothing": outlook.NOTHING,
        "the published method": outlook.PUBLISHED,
        "a strong anchor": outlook.STRONGEST,
    }
    page = (ROOT / "docs" / "staleness" / "regions.md").read_text()
    rows = page.split(f"**short task, {LOSSES[loss]}**")[1].split("**")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    found = {(rate, int(lag)): needed.rstrip("?") for rate, lag, *_, needed in cells}
    for lag, needed in outlook.NEEDED.items():
        for rate, least in zip(outlook.RATES, needed, strict=True):
            assert names[found[rate, lag]] == (column or least)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        *((kind, None) for kind in outlook.KEPT),
        *((kind, rate) for rate, kept in outlook.SLOWER.items() for kind in kept),
    ],
)
def test_the_shares_are_those_of_the_committed_runs(kind: outlook.Kind, rate: str | None) -> None:
    at, kept = ([], outlook.KEPT) if rate is None else ([f"learner.lr={rate}"], outlook.SLOWER[rate])
    runs = [
        r
        for r in lines(ROOT / "docs" / "staleness" / "results.jsonl")
        if r["task"] == "short" and r["optimizer"] == "adamw"
    ]

    def score(row: Row, lag: int) -> float:
        loss, policy, extra = row
        of = (loss, policy, str(lag), [*at, *extra])
        return statistics.fmean(
            r["score"] for r in runs if (r["loss"], r["policy"], r["lag"], r["extra"]) == of
        )

    for lag, share in kept[kind].items():
        rows = COMMITTED[kind]
        least = min(score(row, lag) / score((row[0], "sync", ()), 0) for row in rows)
        assert share == pytest.approx(least, abs=0.02)
