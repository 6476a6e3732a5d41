"""Which role gets which device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import small_recipe

from fopd_cli.engines.building import SamplerOrder, TeacherOrder
from fopd_cli.engines.models.shapes import Shapes
from fopd_cli.engines.vllm import build as vllm_build
from fopd_cli.errors import UserError
from fopd_cli.recipe import Placement, Recipe, load_recipe
from fopd_cli.runtime.build import Setup, build_sampler, build_teacher
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.memory.model import Fit, Models
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import TURNS, Plan, from_plain, place, to_plain
from fopd_cli.runtime.weights.transport import Shared
from fopd_cli.samples import TargetSpec


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

    assert threads("schedule.max_lag=0") == [8, 8, 4, 4]
    assert threads("schedule.max_lag=2") == [None, None, None, None]
    assert threads("schedule.max_lag=2", threads={"sampler": 3}) == [3, None, None, None]
    assert threads("schedule.lag=2") == [2, 2, 2, 2]  # two runs must agree to the bit
    vllm = ("sampler.engine=vllm", "sampler.vllm.tensor_parallel=2")
    assert threads("schedule.max_lag=2", *vllm) == [
        1,
        None,
        None,
        None,
    ]  # its ranks are processes of their own


def test_a_replica_may_span_devices(tmp_path: Path) -> None:
    vllm = ("sampler.engine=vllm", "sampler.vllm.tensor_parallel=2")
    plan = place(recipe(tmp_path, *vllm, mode="partition", sampler=4, teacher=2, learner=2), 8, 64)
    assert [w.devices for w in plan.samplers] == [(0, 1), (2, 3)]
    with pytest.raises(UserError, match=r"sampler.vllm.tensor_parallel: 2 does not divide the 3"):
        place(recipe(tmp_path, *vllm, mode="partition", sampler=3, teacher=2, learner=3), 8, 64)


def test_several_teachers_share_their_devices_and_a_remote_one_has_none(tmp_path: Path) -> None:
    teachers = (
        "teacher=[{name: maths, model: a/b}, {name: far, model: c, engine: http, http: {url: "
        "'http://x/v1'}}, {name: code, model: d/e}]",
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


# ---- what a device holds -----------------------------------------------------------------------------------

GB = 10**9


def shapes(billions: float, width: int = 2048, layers: int = 24) -> Shapes:
    """A model with this many parameters, in round numbers."""
    count = int(billions * GB)
    head = 32_000 * width
    return Shapes(
        parameters=count,
        active=count,
        layers=layers,
        block=(count - 2 * head) // layers,
        root=2 * head,
        head=head,
        width=width,
        queries=width,
        keys=width // 2,
        inner=3 * width,
        normed_queries=False,
        vocab=32_000,
        in_pieces=True,
    )


def sized(
    tmp_path: Path, learning: float, judging: float, gb: int, *overrides: str, **placement: Any
) -> tuple[Recipe, Fit]:
    wanted = recipe(tmp_path, "sampler.engine=vllm", *overrides, **placement)
    models = Models(shapes(learning), {"teacher": shapes(judging, 4096, 40)}, 576, 576)
    return wanted, Fit(wanted, models, gb * GB)


def test_auto_colocates_where_a_device_holds_every_role_at_once(tmp_path: Path) -> None:
    """A 1.5B learner takes 16 bytes per parameter, 24 GB; a 7B teacher 14 GB; vLLM gets the rest."""
    small, fit = sized(tmp_path, 1.5, 7, 80)
    for count in (1, 2):
        plan = place(small, count, 8, fit)
        assert plan.mode == "colocate"
        assert plan.shared
        assert not plan.exclusive
        assert devices(plan) == [list(range(count))] * 3
    plan = place(small, 1, 8, fit)
    (share,) = {s.share for s in plan.samplers}
    taken = {w.spec.role: w.use.peak for w in memory.workers(small, plan, fit.models, fit.device_bytes)}
    assert share is not None
    assert sum(taken.values()) <= 0.9 * 80 * GB  # including an update in transit
    assert taken["learner"] > 24 * GB
    assert taken["teacher"] > 14 * GB
    assert taken["sampler"] == pytest.approx(share * 80 * GB, rel=0.1)
    assert all(w.share is None for w in (*plan.learners, *plan.teachers[0]))
    assert place(small, 8, 64, fit).mode == "partition"
    assert place(*_one(sized(tmp_path, 1.5, 7, 40))).mode == "timeslice"
    assert place(small, 1, 8).mode == "timeslice"  # nothing is known about the device


def split(plan: Plan) -> tuple[str | int, ...]:
    """The mode, and the number of devices of sampler, teacher and learner."""
    return (plan.mode, *(len(group) for group in devices(plan)))


def test_auto_takes_another_split_or_turns_where_the_usual_split_does_not_fit(tmp_path: Path) -> None:
    """A 10B learner takes 160 GB: two devices of 80 GB do not hold it, three do. A 32B teacher fits
    on one, a 40B teacher on two.
    """
    for judging, wanted in ((7, (3, 2, 3)), (32, (3, 2, 3)), (40, (3, 2, 3)), (70, (2, 3, 3))):
        recipe_, fit = sized(tmp_path, 10, judging, 80)
        plan = place(recipe_, 8, 64, fit)
        assert split(plan) == ("partition", *wanted), judging
        asked = recipe_.model_copy(update={"placement": Placement(mode="partition")})
        assert place(asked, 8, 64, fit) == plan
        worst = memory.demands(plan, memory.workers(recipe_, plan, fit.models, fit.device_bytes))
        assert max(d.nbytes for d in worst) <= 0.91 * 80 * GB
    # what the recipe says of a role stays as it is
    few, fit = sized(tmp_path, 10, 32, 80, sampler=1)
    assert split(place(few, 8, 64, fit))[1] == 1
    kept, fit = sized(tmp_path, 10, 32, 80, sampler=4)
    assert split(place(kept, 8, 64, fit)) == ("partition", 4, 1, 3)
    # a replica over two devices
    wide, fit = sized(tmp_path, 10, 32, 80, "sampler.vllm.tensor_parallel=2")
    found = place(wide, 8, 64, fit)
    assert [len(s.devices) for s in found.samplers] == [2]
    assert split(found) == ("partition", 2, 3, 3)
    # four devices hold it in turns alone
    four, fit = sized(tmp_path, 10, 32, 80)
    assert place(four, 4, 64, fit).mode == "timeslice"
    # where nothing fits, what comes closest, of which doctor says what is missing
    huge, fit = sized(tmp_path, 70, 70, 80)
    assert place(huge, 8, 64, fit).mode == "timeslice"
    # three devices are too few for a role each where there are two teachers
    two = recipe(tmp_path, "teacher=[{name: a, model: x/a}, {name: b, model: x/b}]", "loss.support=topk")
    assert place(two, 3, 64).mode == "timeslice"


def _others(tmp_path: Path) -> float:
    """GB of the learner and the teacher."""
    wanted, fit = sized(tmp_path, 1.5, 7, 80)
    found = memory.workers(wanted, place(wanted, 1, 8, fit), fit.models, fit.device_bytes)
    return sum(w.use.peak for w in found if w.spec.role != "sampler") / GB


def shared_by(made: tuple[Recipe, Fit]) -> float:
    (share,) = {s.share for s in place(*_one(made)).samplers}
    assert share is not None
    return share


def test_a_colocated_sampler_takes_what_its_requests_can_need_or_what_is_left_or_what_the_recipe_says(
    tmp_path: Path,
) -> None:
    """A 576-token sample takes 576 x 2 bytes x the width of keys and values x layers."""
    row = 576 * 2 * shapes(1.5).keys * shapes(1.5).layers
    few, more = (shared_by(sized(tmp_path, 1.5, 7, 80, f"sampler.concurrency={n}")) for n in (16, 48))
    assert more - few == pytest.approx(32 * row / (80 * GB), rel=0.01)
    many = shared_by(sized(tmp_path, 1.5, 7, 80, "sampler.concurrency=2000"))
    assert many == pytest.approx(0.9 - _others(tmp_path) / 80, abs=0.01)
    assert more < many
    assert shared_by(sized(tmp_path, 1.5, 7, 80, "sampler.vllm.gpu_memory=0.15")) == 0.15
    by_cache = [shared_by(sized(tmp_path, 1.5, 7, 80, f"sampler.vllm.kv_cache_gb={n}")) for n in (4, 8)]
    assert by_cache[1] - by_cache[0] == pytest.approx(4 / 80)
    for asked in ("sampler.vllm.gpu_memory=0.8", "sampler.vllm.kv_cache_gb=60"):
        assert place(*_one(sized(tmp_path, 1.5, 7, 80, asked))).mode == "timeslice"


def _one(made: tuple[Recipe, Fit]) -> tuple[Recipe, int, int, Fit]:
    return made[0], 1, 8, made[1]


def test_colocate_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    wanted, fit = sized(tmp_path, 4, 14, 80, mode="colocate")
    with pytest.raises(UserError, match=r"placement.mode: colocate: a device cannot hold all roles at once"):
        place(wanted, 1, 8, fit)
    with pytest.raises(UserError, match=r"placement.mode: colocate needs CUDA devices"):
        place(wanted, 0, 8)


def test_transformers_engines_colocate_without_shares(tmp_path: Path) -> None:
    wanted, fit = sized(tmp_path, 0.5, 1, 80, "sampler.engine=transformers")
    plan = place(wanted, 1, 8, fit)
    assert plan.mode == "colocate"
    assert [w.share for w in plan.everyone] == [None] * 4


def test_a_vllm_teacher_beside_others_takes_what_it_needs_and_no_more(tmp_path: Path) -> None:
    wanted, fit = sized(tmp_path, 1.5, 7, 80, "teacher.engine=vllm", "loss.support=topk")
    plan = place(wanted, 1, 8, fit)
    assert plan.mode == "colocate"
    (judge,), (sampler,) = plan.teachers[0], plan.samplers
    assert judge.share is not None
    assert 14 / 80 < judge.share < 24 / 80
    assert sampler.share is not None
    assert judge.share + sampler.share < 0.9


def test_a_teacher_is_replicated_where_a_device_holds_it_and_sharded_where_not(tmp_path: Path) -> None:
    two = {"mode": "partition", "sampler": 3, "teacher": 2, "learner": 3}
    for billions, whole in ((14.0, True), (40.0, False)):
        plan = place(*_eight(sized(tmp_path, 1.5, billions, 80, **two)))
        assert [rank.whole for rank in plan.teachers[0]] == [whole, whole]
    alone = sized(tmp_path, 1.5, 14, 80, mode="partition", sampler=3, teacher=1, learner=4)
    assert not place(*_eight(alone)).teachers[0][0].whole  # a single rank waits for no other


def _eight(made: tuple[Recipe, Fit]) -> tuple[Recipe, int, int, Fit]:
    return made[0], 8, 64, made[1]


def test_the_share_that_is_left_is_what_vllm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's share reaches vLLM's own arguments; without one, its section's value is used."""
    orders = list[SamplerOrder | TeacherOrder]()
    monkeypatch.setattr(vllm_build, "sampler", orders.append)
    monkeypatch.setattr(vllm_build, "teacher", orders.append)
    wanted = recipe(tmp_path, "sampler.engine=vllm", "teacher.engine=vllm", "loss.support=topk")
    setup = Setup(
        wanted,
        260,
        (TargetSpec("topk", 4, torch.float32),),
        (None,),
        64,
        64,
        torch.empty(0),
        Shared(WeightChannel.create([])),
        tmp_path / "r",
    )
    for share in (None, 0.31):
        build_sampler(WorkerSpec("sampler", 0, 1, (0,), 1, share=share), setup)
        build_teacher(WorkerSpec("teacher", 0, 1, (0,), 1, share=share), setup, lambda: None)
    given = [vllm_build._keys(order.section.vllm, order.share) for order in orders]
    assert [keys.gpu_memory for keys in given] == [None, None, 0.31, 0.31]


# ---- turns that overlap ------------------------------------------------------------------------------------


def test_where_a_devices_size_is_not_known_no_turn_overlaps_and_on_a_cpu_all_do(tmp_path: Path) -> None:
    """On a CPU a role that sleeps gives nothing back, so that its turn with another takes nothing more."""
    in_turns = recipe(tmp_path, mode="timeslice")
    assert place(in_turns, 2, 8).overlaps == ()
    assert place(in_turns, 0, 8).overlaps == TURNS
    assert place(recipe(tmp_path, mode="cpu"), 0, 8).overlaps == ()
    assert place(recipe(tmp_path, mode="timeslice", overlap_turns=False), 0, 8).overlaps == ()


def test_a_plan_keeps_its_turns_and_says_them(tmp_path: Path) -> None:
    plan = place(recipe(tmp_path, mode="timeslice"), 0, 8)
    assert plan.describe().endswith("; all turns overlap")
    assert from_plain(json.loads(json.dumps(to_plain(plan)))) == plan
    before = {key: value for key, value in to_plain(plan).items() if key != "overlaps"}
    apart = from_plain(before)  # written by an earlier version
    assert apart.describe().endswith("; no turns overlap")
    some = from_plain({**before, "overlaps": [["sampler", "teacher"], ["learner", "sampler"]]})
    assert some.describe().endswith("; turns that overlap: sampler to teacher, learner to sampler")
    assert "overlap" not in place(recipe(tmp_path), 8, 64).describe()


CUDA = memory.CONTEXT + memory.CUBLAS  # of each process, awake or asleep


def test_a_turn_overlaps_where_the_peak_of_one_and_the_weights_of_the_other_fit(tmp_path: Path) -> None:
    """A 2B student and a 7B teacher on transformers, and a device on which just this is nine tenths: the
    learner's peak, the teacher's weights, and three processes' CUDA.
    """
    made = sized(tmp_path, 2, 7, 80, "sampler.engine=transformers", mode="timeslice")
    plan = place(*_one(made))
    found = {w.spec.role: w.use for w in memory.workers(made[0], plan, made[1].models, made[1].device_bytes)}
    moment = found["learner"].peak + 2 * 7 * GB + 2 * CUDA
    for nbytes, fits in ((int(moment / 0.9) + 2, True), (int(moment / 0.9) - 2, False)):
        fit = Fit(made[0], made[1].models, nbytes)
        plan = place(made[0], 1, 8, fit)
        assert (("learner", "teacher") in plan.overlaps) is fits
        # The way back holds less: the teacher's peak, and the learner's 16 bytes a parameter.
        assert found["teacher"].peak + 2 * 16 * GB + 2 * CUDA < moment - GB
        assert ("teacher", "learner") in plan.overlaps
        (worst,) = memory.demands(plan, memory.workers(made[0], plan, fit.models, nbytes))
        if fits:
            assert worst.who == "a turn from learner to teacher"
            assert worst.nbytes == moment
        else:
            assert worst.nbytes < moment
        assert memory.fits([worst], nbytes)


def test_turns_of_several_teachers_count_all_of_them(tmp_path: Path) -> None:
    """Both teachers wake and sleep together."""
    two = "teacher=[{name: a, model: x/a}, {name: b, model: x/b}]"
    wanted = recipe(tmp_path, two, "loss.support=topk", "sampler.engine=transformers", mode="timeslice")
    models = Models(shapes(0.5), {"a": shapes(7, 4096, 40), "b": shapes(7, 4096, 40)}, 64, 576, 576)
    for gb, fits in ((48, True), (32, False)):  # 28 GB for both, one alone would fit
        plan = place(wanted, 1, 8, Fit(wanted, models, gb * GB))
        assert (("sampler", "teacher") in plan.overlaps) is fits


def test_where_vllm_falls_asleep_the_next_role_takes_no_more_than_its_cache(tmp_path: Path) -> None:
    """vLLM fails if its device has less memory free after it fell asleep than before."""
    for cache, fits in ((16, True), (12, False)):  # of a 7B teacher's 14 GB
        asked = ("teacher.engine=transformers", f"sampler.vllm.kv_cache_gb={cache}")
        plan = place(*_one(sized(tmp_path, 1.5, 7, 140, *asked, mode="timeslice")))
        assert (("sampler", "teacher") in plan.overlaps) is fits
        assert ("teacher", "sampler") in plan.overlaps
    by_default = place(*_one(sized(tmp_path, 1.5, 7, 140, mode="timeslice")))  # vLLM takes most of the device
    assert set(by_default.overlaps) == {("teacher", "learner"), ("learner", "teacher")}
