"""A key or a value that there is not: what was meant is said. And the recipe as people look it up."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import TINY, Fopd, small_recipe

from fopd_cli.errors import UserError
from fopd_cli.recipe import load_recipe


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("learner.learning_rate=1e-6", "'lr'"),
        ("learner.max_steps=5", "'steps'"),
        ("learner.batch_size=5", "'batch_samples'"),
        ("learner.gradient_norm=1", "'clip'"),
        ("learner.temperature=0.7", "'sampler.temperature'"),
        ("sampler.max_tokens=7", "'max_new_tokens'"),
        ("sampler.depth=2", "'schedule.max_lag'"),
        ("max_new_tokens=7", "'sampler.max_new_tokens'"),
        ("learnr.steps=7", "'learner'"),
        ("freshness.policy=fopdd", "'fopd'"),
        ("freshness.policy=Fixed-Refresh", "'fixed_refresh'"),
        ("loss.kind=reverse-kl", "'reverse_kl'"),
        ("sampler.engine=transformer", "'transformers'"),
        ("teacher.engine=VLLM", "'vllm'"),
        ("placement.mode=time-slice", "'timeslice'"),
    ],
)
def test_what_was_meant_by_a_key_or_a_value(tmp_path: Path, override: str, meant: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY)))
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert f"did you mean {meant}" in str(caught.value)


def test_what_was_meant_by_a_path(fopd: Fopd, tmp_path: Path) -> None:
    recipe = fopd.recipe(small_recipe(TINY), "my-recipe.yaml")
    with pytest.raises(UserError, match=r"did you mean '.*my-recipe.yaml'"):
        load_recipe(tmp_path / "my-recipie.yaml")
    err = fopd("doctor", recipe, "--set", f"student.model={TINY}/studnet", code=2).err
    assert f"did you mean '{TINY}/student'" in err
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    rows = {"name": "math", "train": str(tmp_path / "row.jsonl")}
    err = fopd("doctor", fopd.recipe(small_recipe(TINY) | {"task": rows}), code=2).err
    assert f"there is no file '{tmp_path}/row.jsonl'; did you mean '{tmp_path}/rows.jsonl'?" in err


def test_a_section_can_be_looked_up_by_itself(fopd: Fopd) -> None:
    out = fopd("recipe", "--explain", "learner").out
    keys = [line for line in out.splitlines() if not line.startswith(" ")]
    assert "learner.lr" in keys
    assert all(key.startswith("learner.") for key in keys)
    assert fopd("recipe", "learner.lr", "--explain").out.splitlines()[0] == "learner.lr"
    assert "task[math].train" in fopd("recipe", "--explain", "task.train").out
    assert "did you mean 'learner'" in fopd("recipe", "--explain", "lerner", code=2).err


def test_the_template_is_a_recipe(fopd: Fopd) -> None:
    out = fopd("recipe", "--template").out
    assert len(out.splitlines()) < 25
    path = fopd.folder / "new.yaml"
    path.write_text(out)
    recipe = load_recipe(path)
    assert (recipe.task.name, recipe.max_lag, recipe.eval.every) == ("chat", 4, 50)
