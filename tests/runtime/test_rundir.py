"""A run directory that is not empty: when it may be replaced, and the advice when it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import TINY, small_recipe

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.journal.rundir import RunDir


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY)))
    return load_recipe(path)


def test_a_start_that_came_to_nothing_does_not_block_the_next(tmp_path: Path, recipe: Recipe) -> None:
    """It leaves a recipe, a lock and logs, as does a run killed while loading its models."""
    path = tmp_path / "run"
    first = RunDir.create(path, recipe)
    (first.logs / "learner-0.log").write_text("no memory")
    (path / ".rendezvous-1234-learner-0").touch()
    with pytest.raises(UserError, match="is in use by the live process"):  # this one
        RunDir.create(path, recipe)
    del first
    second = RunDir.create(path, recipe)
    assert list(second.logs.iterdir()) == []
    assert second.recipe.is_file()


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        (
            "metrics.jsonl",
            "it is a run that ended before its first checkpoint: delete it, or give another --run-dir",
        ),
        (
            "checkpoints/step-000002/MANIFEST.json",
            r"continue it \(fopd resume .*run\) or give another --run-dir",
        ),
        ("precious", "exists and is not empty; .*give another --run-dir"),
    ],
)
def test_what_holds_anything_else_is_left_alone(
    tmp_path: Path, recipe: Recipe, file: str, advice: str
) -> None:
    path = tmp_path / "run"
    RunDir.create(path, recipe)
    (path / file).parent.mkdir(parents=True, exist_ok=True)
    (path / file).write_text("kept")
    with pytest.raises(UserError, match=advice):
        RunDir.create(path, recipe)
    assert (path / file).read_text() == "kept"
