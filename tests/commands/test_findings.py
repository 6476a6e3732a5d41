"""What doctor and run say about numbers, sizes and prompts that do not fit together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, small_recipe

from fopd_cli import doctor
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime import devices, placing
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.placement import TURNS, place

PLAIN = """
from fopd_cli.samples import Prompt
class Plain:
    def __init__(self, messages): self.messages = messages
    def prompts(self, split):
        if self.messages:
            return [Prompt(i, messages=[{"role": "user", "content": f"{split} {i}"}]) for i in range(64)]
        return [Prompt(i, text=f"{split} {i}") for i in range(64)]
    def grade(self, prompt, response): return 0.0
"""


def said(folder: Path, **changes: Any) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(small_recipe(TINY) | changes if "task" in changes else small_recipe(TINY, **changes))
    )
    recipe = load_recipe(path)
    return [str(f) for f in doctor.findings(load_inputs(recipe, place(recipe, 0)), folder)]


def test_a_sound_recipe_has_none(tmp_path: Path) -> None:
    assert said(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": {"model": str(TINY / "teacher")}, "teacher": {"model": str(TINY / "student")}},
            "are not exchanged",
        ),
        (
            {"learner": {"steps": 4, "warmup_steps": 9}},
            "9 of 4 steps are warm-up, so learner.lr is never reached",
        ),
        ({"learner": {"steps": 4, "warmup_steps": 4}}, "reached in the last one only"),
        (
            {
                "loss": {"support": "sampled", "advantage": "cached"},
                "freshness": {"policy": "async"},
                "schedule": {"max_lag": 2},
            },
            "schedule.max_lag: at lag 2 policy gradients without a strong anchor kept 0%",
        ),
        (
            {
                "learner": {"batch_samples": 512},
                "task": {"name": "arithmetic", "horizon": 2, "eval_prompts": 8, "train_prompts": 100},
            },
            "a batch of 512 is larger than the data (100 samples of all training prompts)",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "task" in changes:
        changes = {
            "learner": {**small_recipe(TINY)["learner"], **changes["learner"]},
            "task": changes["task"],
        }
    assert any(message in line for line in said(tmp_path, **changes))


def test_plain_prompts_of_a_task_of_ones_own_are_asked_about(tmp_path: Path) -> None:
    (tmp_path / "plain_prompts.py").write_text(PLAIN)

    def found(messages: bool, **more: Any) -> list[str]:
        task = {"name": "plain_prompts:Plain", "options": {"messages": messages}, **more}
        return [line for line in said(tmp_path, task=task) if "chat template" in line]

    (line,) = found(False)
    assert "gives prompts as plain text, so the student's chat template is not applied" in line
    assert found(False, chat=False) == []
    assert found(True) == []


def test_one_thing_is_said_once(tmp_path: Path) -> None:
    """Three teachers with the same model: a problem with it is one finding."""
    teachers = [{"model": str(TINY / "student"), "name": f"t{i}"} for i in range(3)]
    recipe = small_recipe(TINY)
    recipe["teacher"] = teachers
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parsed = load_recipe(path)
    lines = [str(f) for f in doctor.findings(load_inputs(parsed, place(parsed, 0)), tmp_path)]
    assert len([line for line in lines if "the same model: every loss is 0" in line]) == 1


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gigabytes", "level"),
    [(2.0, "error"), (3.2, "warning"), (80.0, None)],
    ids=["too small", "tight", "large"],
)
def test_a_device_is_held_against_the_sum_of_all_that_a_role_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, level: str | None
) -> None:
    """Time-sliced on one device, a learner of 0.3 million parameters holds little itself. CUDA, its
    libraries, the loss's chunks and the sleeping roles fill the device.
    """
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY, placement={"mode": "timeslice"})))
    parsed = load_recipe(path)
    inputs = load_inputs(parsed, place(parsed, 1))
    monkeypatch.setattr(devices, "count", lambda: 1)
    monkeypatch.setattr(devices, "memory", lambda device: int(gigabytes * 1e9))
    lines = [f for f in doctor.findings(inputs, tmp_path) if "by arithmetic" in f.what]
    if level is None:
        assert lines == []
        return
    (line,) = lines
    assert line.level == level
    assert re.match(
        rf"learner-0 on cuda:0 needs \d\.\d GB by arithmetic, the device has {gigabytes} GB "
        r"\(the largest parts: [^)]*CUDA and its libraries \(estimate\) 1.0",
        line.what,
    ), line.what
    assert "micro_tokens" in line.cure


def test_which_turns_overlap_is_decided_when_the_length_of_the_prompts_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placement assumes 1024 tokens; the prompts here have a few. On a device of the size between, a turn
    overlaps only with these, and doctor has nothing against it.
    """
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY, placement={"mode": "timeslice"})))
    parsed = load_recipe(path)
    plan = place(parsed, 1)
    known = load_inputs(parsed, plan).models

    def moment(models: memory.Models) -> int:
        here = memory.workers(parsed, plan, models, 0)
        return max(memory.total(memory.between(here, turn)) for turn in TURNS)

    assumed = placing.models(parsed)
    assert moment(known) < moment(assumed)
    size = int((moment(known) + moment(assumed)) / 2 / 0.9)
    monkeypatch.setattr(devices, "count", lambda: 1)
    monkeypatch.setattr(devices, "memory", lambda device: size)
    placed = placing.placed(parsed)
    assert placed.overlaps != TURNS
    inputs = load_inputs(parsed, placed)
    assert inputs.plan.overlaps == TURNS
    assert not [f for f in doctor.findings(inputs, tmp_path) if "by arithmetic" in f.what]


@pytest.mark.parametrize("copied", [True, False])
def test_main_memory_is_held_against_the_sum_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """What can be had by writing checkpoints without a copy is offered where there is one."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY, checkpoint={"asynchronous": copied})))
    parsed = load_recipe(path)
    inputs = load_inputs(parsed, place(parsed, 0))
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    (line,) = [f for f in doctor.findings(inputs, tmp_path) if "by arithmetic" in f.what]
    assert line.level == "error"
    assert re.match(
        r"the run needs \d\.\d GB by arithmetic, this machine has 1.0 GB \(the largest", line.what
    )
    assert ("checkpoint.asynchronous: false" in line.cure) == copied
