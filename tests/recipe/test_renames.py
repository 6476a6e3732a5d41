"""Keys by the names that they used to have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, small_recipe

from fopd_cli import errors
from fopd_cli.recipe import explain, load_recipe, recorded_recipe
from fopd_cli.recipe.renames import RENAMED, new_name, renamed
from fopd_cli.report import tables
from fopd_cli.report.reading import read
from fopd_cli.runtime.journal.rundir import RunDir

OLD: dict[str, Any] = {"schedule": {"depth": 3}, "freshness": {"replay": {"share": 0.5}}}
NEW: dict[str, Any] = {"schedule": {"max_lag": 3}, "freshness": {"reexecute": {"share": 0.5}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def written(path: Path, sections: dict[str, Any]) -> Path:
    """A small recipe with these sections in place of its own."""
    path.write_text(yaml.safe_dump({**small_recipe(TINY), **sections}))
    return path


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    known = {key for key, *_ in explain()}
    for old in RENAMED:
        assert not any(key == old or key.startswith(f"{old}.") for key in known)
        assert any(key == new_name(old) or key.startswith(f"{new_name(old)}.") for key in known)


def test_old_names_mean_what_they_meant_and_a_note_says_the_new_ones(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(written(path, OLD))
    notes = capsys.readouterr().err.splitlines()
    load_recipe(path)  # as some commands do
    assert capsys.readouterr().err == ""
    assert (recipe.schedule.max_lag, recipe.freshness.reexecute.share) == (3, 0.5)
    assert len(notes) == len(RENAMED)
    for note, old in zip(notes, RENAMED, strict=True):
        assert note.startswith(f"note: {path}: {old} is now called {new_name(old)}")
    assert recipe == load_recipe(written(path, NEW))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.depth=3", "freshness.replay.share=0.5"],
        ["schedule={depth: 3}", "freshness.replay={share: 0.5}"],
        ["schedule.depth=2", "schedule.depth=3", "freshness={replay: {share: 0.5}}"],
    ],
)
@pytest.mark.parametrize("section", [{"depth": 1}, {"max_lag": 1}])
def test_old_names_in_overrides(
    path: Path, section: dict[str, int], overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    written(path, {"schedule": section, "freshness": {}})
    recipe = load_recipe(path, overrides)
    assert (recipe.schedule.max_lag, recipe.freshness.reexecute.share) == (3, 0.5)
    said = capsys.readouterr().err
    for override in overrides:
        assert f"--set '{override}': " in said


def test_an_override_by_the_new_name_wins_over_the_file_by_the_old_one(path: Path) -> None:
    assert load_recipe(written(path, OLD), ["schedule.max_lag=2"]).schedule.max_lag == 2


@pytest.mark.parametrize(
    ("sections", "overrides", "where"),
    [
        ({"schedule": {"depth": 3, "max_lag": 3}}, [], "recipe.yaml: schedule.max_lag"),
        ({"freshness": {"replay": {}, "reexecute": None}}, [], "recipe.yaml: freshness.reexecute"),
        ({}, ["schedule.depth=3", "schedule.max_lag=3"], "--set: schedule.max_lag"),
        ({}, ["freshness.reexecute.min_lag=2", "freshness.replay.share=1"], "--set: freshness.reexecute"),
        ({}, ["schedule={depth: 3, max_lag: 3}"], "schedule.max_lag"),
    ],
)
def test_both_names_at_once_are_refused(
    path: Path, sections: dict[str, Any], overrides: list[str], where: str
) -> None:
    with pytest.raises(errors.UserError, match=f"{where} is given twice, once by its old name") as caught:
        load_recipe(written(path, sections), overrides)
    assert "\n" not in str(caught.value)


def test_what_an_older_version_wrote_is_read(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe in a checkpoint, in a run directory and in its history; only the user's own words get a
    note.
    """
    recipe = load_recipe(written(path, NEW))
    dumped = recipe.model_dump(mode="json")
    dumped["schedule"]["depth"] = dumped["schedule"].pop("max_lag")
    dumped["freshness"]["replay"] = dumped["freshness"].pop("reexecute")
    path.write_text(yaml.safe_dump(dumped))
    assert read(path.parent).recipe == recipe.model_dump(mode="json")
    assert recorded_recipe(dumped, path) == recipe
    run = RunDir(path.parent)
    changed = {"schedule.depth": [4, 3], "freshness.replay.share": [0.125, 0.5], "learner.lr": [1.0, 2.0]}
    run.history.write_text(json.dumps({"step": 2, "changed": changed}) + "\n")
    assert run.changed() == [(2, {renamed(key): values for key, values in changed.items()})]
    assert capsys.readouterr().err == ""


def test_a_difference_between_an_older_run_and_a_newer_one(tmp_path: Path) -> None:
    for name, sections in (("older", OLD), ("newer", {**NEW, "seed": 7})):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "recipe.yaml", sections)
    keys = tables.of_differences(tmp_path / "older", tmp_path / "newer").partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in keys] == ["recipe", "seed"]


def test_nothing_that_is_shipped_uses_an_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe in [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/recipes/*.yaml")]:
        load_recipe(recipe)
    assert "is now called" not in capsys.readouterr().err
    folders = ("benchmarks", "docs", "examples", "recipes", "scripts")
    files = [ROOT / "README.md", *(f for name in folders for f in (ROOT / name).rglob("*"))]
    texts = {f: f.read_text() for f in files if f.suffix in {".md", ".py", ".yaml", ".sh", ".csv", ".jsonl"}}
    assert [f for f, text in texts.items() if any(old in text for old in RENAMED)] == []
