"""Which process runs on which device. Pure arithmetic over the recipe and the number of devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.workers import WorkerSpec

Devices = tuple[int, ...]  # CUDA ordinals of one process; empty: the CPU


@dataclass(frozen=True)
class Plan:
    """All worker processes of a run; `exclusive`: roles take turns (time-slicing)."""

    mode: Literal["cpu", "timeslice", "partition"]
    samplers: tuple[WorkerSpec, ...]
    teachers: tuple[WorkerSpec, ...]
    learners: tuple[WorkerSpec, ...]
    grader: WorkerSpec

    @property
    def exclusive(self) -> bool:
        return self.mode == "timeslice"

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for workers in (self.samplers, self.teachers, self.learners):
            where = [f"cuda:{d}" for w in workers for d in w.devices] or [f"cpu, {workers[0].threads} threads each"]
            parts.append(f"{len(workers)} {workers[0].role} ({', '.join(where)})")
        return f"{self.mode}: " + "; ".join(parts)


def cuda_devices() -> int:
    """Visible CUDA devices, counted without making a context in this process."""
    import torch

    return torch.cuda.device_count()


def place(recipe: Recipe, devices: int, cores: int | None = None) -> Plan:
    """Resolve the recipe's placement on a box with so many CUDA devices and cores."""
    cores = cores or len(os.sched_getaffinity(0))
    mode = recipe.placement.mode
    if mode == "auto":
        mode = "cpu" if devices == 0 else "timeslice" if devices < 3 else "partition"
    if mode == "partition" and devices == 0:
        raise UserError("placement.mode: partition needs CUDA devices and there are none; set it to cpu or timeslice")
    if mode == "partition":
        return _partition(recipe, devices, cores)
    if mode == "timeslice" and devices > 0:
        everywhere: list[Devices] = [(d,) for d in range(devices)]
        return _plan(recipe, "timeslice", [everywhere, everywhere, everywhere], cores)
    p = recipe.placement
    counts = [p.sampler or 1, p.teacher or 1, p.learner or 1]
    return _plan(recipe, mode, [[()] * n for n in counts], cores)


def _partition(recipe: Recipe, devices: int, cores: int) -> Plan:
    p = recipe.placement
    if devices < 3:
        raise UserError(
            f"placement.mode: partition needs at least 3 CUDA devices, one a role, and there are {devices}; set it to timeslice"
        )
    sampler = p.sampler or max(1, devices // 2)
    teacher = p.teacher or max(1, devices // 4)
    learner = p.learner or max(1, devices - sampler - teacher)
    if sampler + teacher + learner > devices:
        raise UserError(
            f"placement: sampler {sampler} + teacher {teacher} + learner {learner} devices are more than the {devices} there are"
        )
    numbers = iter(range(devices))
    groups: list[list[Devices]] = [[(next(numbers),) for _ in range(n)] for n in (sampler, teacher, learner)]
    return _plan(recipe, "partition", groups, cores)


def _plan(
    recipe: Recipe, mode: Literal["cpu", "timeslice", "partition"], groups: list[list[Devices]], cores: int
) -> Plan:
    samplers, teachers, learners = groups
    threads = recipe.placement.threads
    # Taking turns, each role may use all cores; side by side they share them.
    workers = len(samplers) + len(teachers) + len(learners)

    def share(count: int) -> int:
        return max(1, cores // (count if mode == "timeslice" else workers))

    def specs(role: str, devices: list[Devices], wanted: int | None) -> tuple[WorkerSpec, ...]:
        n = len(devices)
        return tuple(WorkerSpec(role, rank, n, devices[rank], wanted or share(n)) for rank in range(n))

    return Plan(
        mode,
        specs("sampler", samplers, threads.sampler),
        specs("teacher", teachers, threads.teacher),
        specs("learner", learners, threads.learner),
        WorkerSpec("grader", 0, 1, (), 1),
    )
