"""Devices as this command received them: entries of `CUDA_VISIBLE_DEVICES`, never ordinals into it.

No GPU is needed: the number that CUDA finds, and NVML's answers, are faked; the list, the placement, the
environments and the workers are real.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch
import yaml
from conftest import ROOT, TINY, small_recipe

from fopd_cli import doctor, evaluation
from fopd_cli.errors import UserError
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime import devices, placing
from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec, environment
from fopd_cli.runtime.placement import cuda_devices, place

UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
OTHER = "GPU-11112222-d72c-4106-c12f-20bd9faed9f6"
MIG = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/0"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


Box = Callable[[str | None, int], None]


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Box:
    """`box(list, found)`: the inherited list, and how many of its devices CUDA finds."""

    def pretend(value: str | None, found: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
        if value is None:
            monkeypatch.delenv(devices.VISIBLE, raising=False)
        else:
            monkeypatch.setenv(devices.VISIBLE, value)

    return pretend


@pytest.mark.parametrize(
    ("value", "found", "entries"),
    [
        (None, 3, ["0", "1", "2"]),
        ("4,5,6,7", 4, ["4", "5", "6", "7"]),
        (" 3 , 1", 2, ["3", "1"]),
        ("", 0, []),
        ("-1", 0, []),
        ("2,-1,3", 1, ["2"]),  # CUDA stops at the first invalid entry
        ("0,9", 1, ["0"]),
        (f"{UUID},{OTHER}", 2, [UUID, OTHER]),
        ("GPU-8932,GPU-1111", 2, ["GPU-8932", "GPU-1111"]),  # a UUID may be cut short
        (f"{UUID},1", 1, [UUID]),
        (f"{MIG},MIG-aa,MIG-bb", 1, [MIG, "MIG-aa", "MIG-bb"]),  # CUDA shows a process one instance
    ],
)
def test_workers_get_entries_of_the_inherited_list(
    box: Box, value: str | None, found: int, entries: list[str]
) -> None:
    box(value, found)
    assert cuda_devices() == len(entries)
    specs = [WorkerSpec("sampler", i, 9, (i,), 1) for i in range(cuda_devices())]
    assert [environment(spec)[devices.VISIBLE] for spec in specs] == entries
    everything = WorkerSpec("sampler", 0, 1, tuple(range(len(entries))), 1)
    assert environment(everything)[devices.VISIBLE] == ",".join(entries)
    assert environment(WorkerSpec("grader", 0, 1, (), 1))[devices.VISIBLE] == ""


@pytest.mark.parametrize("value", ["4,5,4", "0, 0", f"{UUID},{UUID}", f"{UUID},GPU-8932f937", "1,01"])
def test_a_device_that_stands_twice_is_refused(box: Box, value: str) -> None:
    """CUDA then shows no devices, and the run would silently have been on the CPU."""
    box(value, 0)
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES: .* twice, .* name each once"):
        cuda_devices()


def tell(spec: WorkerSpec, mailbox: Mailbox) -> None:
    mailbox.send(os.environ[devices.VISIBLE])
    mailbox.receive(block=True)


def test_a_worker_sees_its_own_device_and_so_does_one_that_is_started_again(box: Box, tmp_path: Path) -> None:
    box("7,5,3", 3)
    with Fleet(tmp_path, 60, 60) as fleet:
        spec = WorkerSpec("sampler", 1, 2, (1, 2), 1)
        for start in (spec, replace(spec, restarts=1)):
            fleet.start(start, tell)
            ((_, said),) = fleet.receive(timeout=60)
            assert said == "5,3"
            fleet.remove(spec.name)
        assert os.environ[devices.VISIBLE] == "7,5,3"


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_use_the_devices_that_were_handed_out_each_by_its_name(
    box: Box, path: Path, count: int
) -> None:
    """The real placement and environments: every role has devices, with one process per device and role, and
    only names on the list. What cannot be placed names the key to blame.
    """
    names = [str(9 - i) for i in range(count)]
    box(",".join(names), count)
    recipe = load_recipe(path)
    p = recipe.placement
    if p.mode == "partition" and count < sum(filter(None, (p.sampler, p.teacher, p.learner))):
        with pytest.raises(UserError, match=r"^placement"):
            place(recipe, cuda_devices(), cores=16)
        return
    plan = place(recipe, cuda_devices(), cores=16)
    given = []
    for role in (plan.samplers, *plan.teachers, plan.learners):
        entries = [e for spec in role for e in environment(spec)[devices.VISIBLE].split(",")]
        assert len(set(entries)) == len(entries)
        assert set(entries) <= set(names)
        given.append(set(entries))
    if plan.mode == "partition":
        assert sum(map(len, given)) == len(set.union(*given)) == count
    else:
        assert all(own == set(names) for own in given)
    assert environment(plan.grader)[devices.VISIBLE] == ""


def eval_recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small_recipe(TINY)))
    return load_recipe(path, overrides)


def test_a_job_of_fopd_eval_has_the_devices_that_its_replica_is_split_over(box: Box, tmp_path: Path) -> None:
    box("1,3,5,7,9", 5)
    split = eval_recipe(tmp_path, "sampler.engine=vllm", "sampler.vllm.tensor_parallel=2")
    assert evaluation.default_jobs(split) == 2
    assert evaluation._job_devices(split, "all") == [(0, 1), (2, 3)]
    whole = eval_recipe(tmp_path)
    assert evaluation.default_jobs(whole) == 5
    assert evaluation._job_devices(whole, "generate") == [(0,), (1,), (2,), (3,), (4,)]
    assert evaluation._job_devices(split, "grade") == [()]
    wide = eval_recipe(tmp_path, "sampler.engine=vllm", "sampler.vllm.tensor_parallel=8")
    with pytest.raises(UserError, match=r"tensor_parallel: a replica is split over 8 devices, there are 5"):
        evaluation._job_devices(wide, "all")
    box("", 0)
    assert evaluation.default_jobs(split) == 1
    assert evaluation._job_devices(split, "all") == [()]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a driver with three devices, one of them split by MIG, without a real driver."""
    devices = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"]
    sizes = {"GPU-aaaa-1": 81559 << 20, "GPU-bbbb-2": 40960 << 20, "MIG-dddd": 39 << 30}

    def of_index(index: int) -> str:
        if index >= len(devices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return devices[index]

    def of_uuid(uuid: str) -> str:
        if uuid not in sizes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def memory(handle: str) -> SimpleNamespace:
        if handle not in sizes:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=sizes[handle])

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(devices))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", of_index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", of_uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        ("1,0,2,7", [40960 << 20, 81559 << 20, None, None]),
        ("GPU-bbbb,GPU-aaaa-1,GPU-cccc,GPU-eeee", [40960 << 20, 81559 << 20, None, None]),
        ("MIG-dddd,MIG-eeee", [39 << 30, None]),
    ],
)
def test_a_devices_memory_is_that_of_its_entry(box: Box, value: str, sizes: list[int | None]) -> None:
    box(value, len(sizes))
    assert [devices.memory(d) for d in range(len(sizes))] == sizes


@pytest.mark.parametrize("installed", [True, False])
def test_where_no_memory_is_known_doctor_says_what_follows(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    box("GPU-ffff", 1)  # installed, but without a driver or without this device
    if not installed:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices.memory(0) is None
    recipe = eval_recipe(tmp_path)
    assert placing.fit(recipe, 1) is None
    plan = placing.placed(recipe)
    assert plan.mode == "timeslice"
    (note,) = [f for f in doctor._memory(load_inputs(recipe, plan)) if f.level == "note"]
    assert "auto does not choose colocate" in str(note)
    assert "pip install nvidia-ml-py" in note.cure


def test_devices_that_cuda_does_not_find_are_named(box: Box) -> None:
    box("0,1,8", 2)
    (finding,) = doctor._visible()
    assert str(finding).startswith("warning: CUDA_VISIBLE_DEVICES: CUDA finds 2 devices and none for 8;")
    box("0,1", 2)
    assert not list(doctor._visible())
