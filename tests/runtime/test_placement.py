"""Who gets which device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import small_recipe

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.placement import Plan, place


def recipe(tmp_path: Path, *overrides: str, **placement: Any) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, placement=placement)))
    return load_recipe(path, overrides)


def devices(plan: Plan) -> list[list[int]]:
    return [[d for w in group for d in w.devices] for group in (plan.samplers, *plan.teachers, plan.learners)]


def test_auto_follows_the_box(tmp_path: Path) -> None:
    auto = recipe(tmp_path)
    assert place(auto, 0, 8).mode == "cpu"
    assert place(auto, 1, 8).mode == "timeslice"
    eight = place(auto, 8, 64)
    assert eight.mode == "partition"
    assert devices(eight) == [[0, 1, 2, 3], [4, 5], [6, 7]]


def test_partition_as_asked(tmp_path: Path) -> None:
    plan = place(recipe(tmp_path, mode="partition", sampler=3, teacher=2, learner=3), 8, 64)
    assert devices(plan) == [[0, 1, 2], [3, 4], [5, 6, 7]]
    assert [w.world for w in plan.learners] == [3, 3, 3]


def test_timeslice_gives_everyone_everything(tmp_path: Path) -> None:
    plan = place(recipe(tmp_path, mode="timeslice"), 2, 16)
    assert devices(plan) == [[0, 1], [0, 1], [0, 1]]
    assert plan.exclusive
    assert plan.learners[0].threads == 8


def test_on_a_cpu_cores_go_by_turns_by_need_or_in_shares(tmp_path: Path) -> None:
    def threads(*overrides: str, **placement: Any) -> list[int | None]:
        plan = place(recipe(tmp_path, *overrides, mode="cpu", learner=2, **placement), 4, 8)
        assert devices(plan) == [[], [], []]
        return [w.threads for w in (plan.samplers[0], *plan.teachers[0], *plan.learners)]

    assert threads("schedule.depth=0") == [8, 8, 4, 4]
    assert threads("schedule.depth=2") == [None, None, None, None]
    assert threads("schedule.depth=2", threads={"sampler": 3}) == [3, None, None, None]
    assert threads("schedule.lag=2") == [2, 2, 2, 2]  # two runs must agree to the bit
    vllm = ("sampler.engine=vllm", "sampler.vllm.tensor_parallel=2")
    assert threads("schedule.depth=2", *vllm) == [1, None, None, None]  # its ranks are processes of their own


def test_a_replica_may_span_devices(tmp_path: Path) -> None:
    vllm = ("sampler.engine=vllm", "sampler.vllm.tensor_parallel=2")
    plan = place(recipe(tmp_path, *vllm, mode="partition", sampler=4, teacher=2, learner=2), 8, 64)
    assert [w.devices for w in plan.samplers] == [(0, 1), (2, 3)]
    with pytest.raises(UserError, match=r"sampler.vllm.tensor_parallel: 2 does not divide the 3"):
        place(recipe(tmp_path, *vllm, mode="partition", sampler=3, teacher=2, learner=3), 8, 64)


def test_several_teachers_share_their_devices_and_a_remote_one_has_none(tmp_path: Path) -> None:
    teachers = (
        "teacher=[{name: maths, model: a/b}, {name: far, model: c, engine: http, http: {url: "
        "'http://x/v1'}}, "
        "{name: code, model: d/e}]",
        "loss.support=topk",
    )
    plan = place(recipe(tmp_path, *teachers, mode="partition", sampler=2, teacher=4, learner=2), 8, 64)
    assert [[w.devices for w in t] for t in plan.teachers] == [[(2,), (4,)], [()], [(3,), (5,)]]
    assert [w.name for t in plan.teachers for w in t] == [
        "teacher-maths-0",
        "teacher-maths-1",
        "teacher-far-0",
        "teacher-code-0",
        "teacher-code-1",
    ]
    with pytest.raises(UserError, match="fewer than the 2 teachers"):
        place(recipe(tmp_path, *teachers, mode="partition", sampler=2, teacher=1, learner=2), 8, 64)


@pytest.mark.parametrize(
    ("placement", "count", "message"),
    [
        ({"mode": "partition"}, 0, "there are none"),
        ({"mode": "partition"}, 2, "at least 3"),
        ({"mode": "partition", "sampler": 6, "teacher": 2, "learner": 2}, 8, "more than the 8"),
    ],
)
def test_what_cannot_be_placed(tmp_path: Path, placement: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place(recipe(tmp_path, **placement), count, 8)
