"""Which process runs on which device. Pure arithmetic over the recipe and the number of devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from fopd_cli.engines.registry import engine_of
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, Sampler, Teacher
from fopd_cli.runtime import devices as visible
from fopd_cli.runtime.crew.fleet import WorkerSpec

Devices = tuple[int, ...]  # of one process, counted among those visible here; empty: the CPU


@dataclass(frozen=True)
class Plan:
    """All worker processes of a run; `exclusive`: roles take turns (time-slicing)."""

    mode: Literal["cpu", "timeslice", "partition"]
    samplers: tuple[WorkerSpec, ...]
    teachers: tuple[tuple[WorkerSpec, ...], ...]  # the ranks of each teacher
    learners: tuple[WorkerSpec, ...]
    grader: WorkerSpec

    @property
    def exclusive(self) -> bool:
        return self.mode == "timeslice"

    @property
    def everyone(self) -> tuple[WorkerSpec, ...]:
        """All processes."""
        return (*self.learners, *(s for t in self.teachers for s in t), *self.samplers, self.grader)

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for workers in (self.samplers, *self.teachers, self.learners):
            threads = "cores by need" if workers[0].threads is None else f"{workers[0].threads} threads each"
            where = [f"cuda:{d}" for w in workers for d in w.devices] or [f"cpu, {threads}"]
            label = f" {workers[0].label}" if workers[0].label else ""
            parts.append(f"{len(workers)} {workers[0].role}{label} ({', '.join(where)})")
        return f"{self.mode}: " + "; ".join(parts)


def cuda_devices() -> int:
    """Visible CUDA devices, counted without making a context in this process."""
    return visible.count()


def place(recipe: Recipe, devices: int, cores: int | None = None) -> Plan:
    """Resolve the recipe's placement on a box with so many CUDA devices and cores."""
    cores = cores or len(os.sched_getaffinity(0))
    mode = recipe.placement.mode
    if mode == "auto":
        mode = "cpu" if devices == 0 else "timeslice" if devices < 3 else "partition"
    if mode == "partition" and devices == 0:
        raise UserError(
            "placement.mode: partition needs CUDA devices and there are none; set it to cpu or timeslice"
        )
    if mode == "partition":
        groups = _partition(recipe, devices)
    elif mode == "timeslice" and devices > 0:
        everywhere = list(range(devices))
        groups = _Groups(
            _replicas(everywhere, recipe.sampler, "sampler"),
            [_replicas(everywhere, t, "teacher") for t in recipe.teachers],
            [(d,) for d in everywhere],
        )
    else:
        p = recipe.placement
        teachers: list[list[Devices]] = [
            [()] * (1 if engine_of(t).remote else p.teacher or 1) for t in recipe.teachers
        ]
        groups = _Groups([()] * (p.sampler or 1), teachers, [()] * (p.learner or 1))
    return _plan(recipe, mode, groups, cores)


@dataclass
class _Groups:
    """The devices of every process, by role."""

    samplers: list[Devices]
    teachers: list[list[Devices]]
    learners: list[Devices]


def _partition(recipe: Recipe, devices: int) -> _Groups:
    p = recipe.placement
    local = [t for t in recipe.teachers if not engine_of(t).remote]
    fewest = 2 + len(local)
    if devices < fewest:
        raise UserError(
            f"placement.mode: partition needs at least {fewest} CUDA devices, one a role, and there are "
            f"{devices}; set it to timeslice"
        )
    split = devices_of_a_replica(recipe.sampler)
    sampler = p.sampler or max(split, devices // 2 // split * split)
    teacher = (p.teacher or max(len(local), devices // 4)) if local else 0
    learner = p.learner or max(1, devices - sampler - teacher)
    if sampler + teacher + learner > devices:
        raise UserError(
            f"placement: sampler {sampler} + teacher {teacher} + learner {learner} devices are more than "
            f"the {devices} there are"
        )
    if teacher < len(local):
        raise UserError(f"placement.teacher: {teacher} devices are fewer than the {len(local)} teachers")
    numbers = list(range(devices))
    ours, theirs, rest = (
        numbers[:sampler],
        numbers[sampler:][:teacher],
        numbers[sampler + teacher :][:learner],
    )
    shares = {t.name: theirs[i :: len(local)] for i, t in enumerate(local)}
    return _Groups(
        _replicas(ours, recipe.sampler, "sampler"),
        [_replicas(shares.get(t.name, []), t, "teacher") for t in recipe.teachers],
        [(d,) for d in rest],
    )


def devices_of_a_replica(engine: Sampler | Teacher) -> int:
    """That one replica is split over; on a CPU they are processes."""
    return engine_of(engine).devices(engine)


def _replicas(devices: list[int], engine: Sampler | Teacher, role: str) -> list[Devices]:
    """One process per replica, each with the devices that it is split over; a remote teacher has none."""
    if engine_of(engine).remote:
        return [()]
    split = devices_of_a_replica(engine)
    if len(devices) % split:
        raise UserError(
            f"{role}.{engine_of(engine).split_key}: {split} does not divide the {len(devices)} devices of "
            f"the {role}; change it or placement.{role}"
        )
    return [tuple(devices[i : i + split]) for i in range(0, len(devices), split)]


def _plan(
    recipe: Recipe, mode: Literal["cpu", "timeslice", "partition"], groups: _Groups, cores: int
) -> Plan:
    threads = recipe.placement.threads
    # Taking turns, as at depth 0, each role may use all cores; side by side they divide them: by need on a
    # CPU, in fixed shares where two runs must agree to the bit (another number of threads adds up in another
    # order).
    turns = mode == "timeslice" or (mode == "cpu" and recipe.max_lag == 0)
    by_need = mode == "cpu" and recipe.schedule.lag is None and not turns
    busy = [
        t for t, engine in zip(groups.teachers, recipe.teachers, strict=True) if not engine_of(engine).remote
    ]
    workers = len(groups.samplers) + sum(map(len, busy)) + len(groups.learners)

    def specs(
        role: str,
        engine: Sampler | Teacher | None,
        devices: list[Devices],
        wanted: int | None,
        index: int = 0,
        label: str = "",
    ) -> tuple[WorkerSpec, ...]:
        n, split = len(devices), 1 if engine is None else devices_of_a_replica(engine)
        remote = engine is not None and engine_of(engine).remote  # waits, and computes nothing
        fixed = 1 if remote else max(1, cores // (n if turns else workers) // split)
        share = wanted or (None if by_need and split == 1 and not remote else fixed)
        return tuple(WorkerSpec(role, rank, n, devices[rank], share, index, label) for rank in range(n))

    several = len(recipe.teachers) > 1
    teachers = [
        specs("teacher", engine, group, threads.teacher, i, engine.name if several else "")
        for i, (group, engine) in enumerate(zip(groups.teachers, recipe.teachers, strict=True))
    ]
    return Plan(
        mode,
        specs("sampler", recipe.sampler, groups.samplers, threads.sampler),
        tuple(teachers),
        specs("learner", None, groups.learners, threads.learner),
        WorkerSpec("grader", 0, 1, (), 1),
    )
