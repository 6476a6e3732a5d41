"""Which process runs on which device. Pure arithmetic over the recipe, the number of devices and, where
known, what a device can hold (`memory/model.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any, Literal, Protocol, get_args

from fopd_cli.engines.registry import engine_of, teacher_facts
from fopd_cli.errors import UserError
from fopd_cli.names import WorkerRole
from fopd_cli.recipe import Recipe, Sampler, Teacher
from fopd_cli.runtime import devices as visible
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.scheduling.tickets import Role

SPARE = 0.1  # fraction of a device: for the allocator's holes and what arithmetic misses
FULL = 1 - SPARE + 0.01  # fraction of a device that a plan may fill
Mode = Literal["cpu", "timeslice", "partition", "colocate"]
Devices = tuple[int, ...]  # of one process, numbered among those visible here; empty: the CPU
Turn = tuple[Role, Role]  # a change of turns: who falls asleep, who wakes
TURNS: tuple[Turn, ...] = tuple(permutations(get_args(Role), 2))


@dataclass(frozen=True)
class Plan:
    """All worker processes of a run; `exclusive`: roles take turns (time-slicing). In the turns of `overlaps`
    the next role wakes while the last one falls asleep.
    """

    mode: Mode
    samplers: tuple[WorkerSpec, ...]
    teachers: tuple[tuple[WorkerSpec, ...], ...]  # the ranks of each teacher
    learners: tuple[WorkerSpec, ...]
    grader: WorkerSpec
    overlaps: tuple[Turn, ...] = ()

    @property
    def exclusive(self) -> bool:
        return self.mode == "timeslice"

    @property
    def shared(self) -> bool:
        """Whether several roles use one device. They then start one after the other: vLLM measures what is
        free.
        """
        return self.mode in ("timeslice", "colocate")

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
        if self.exclusive:
            parts.append(self.describe_turns())
        return f"{self.mode}: " + "; ".join(parts)

    def describe_turns(self) -> str:
        """Which turns overlap, for people."""
        if set(self.overlaps) == set(TURNS):
            return "all turns overlap"
        named = ", ".join(f"{sleeper} to {waker}" for sleeper, waker in self.overlaps)
        return f"turns that overlap: {named}" if named else "no turns overlap"


def to_plain(plan: Plan) -> dict[str, Any]:
    """As JSON can hold it."""
    return asdict(plan)


def from_plain(found: Mapping[str, Any]) -> Plan:
    """The inverse. Raises KeyError or TypeError for anything else."""

    def spec(row: Mapping[str, Any]) -> WorkerSpec:
        return WorkerSpec(**{**row, "devices": tuple(row["devices"])})

    return Plan(
        found["mode"],
        tuple(map(spec, found["samplers"])),
        tuple(tuple(map(spec, ranks)) for ranks in found["teachers"]),
        tuple(map(spec, found["learners"])),
        spec(found["grader"]),
        tuple((sleeper, waker) for sleeper, waker in found.get("overlaps", ())),  # older runs have none
    )


def cuda_devices() -> int:
    """Visible CUDA devices, counted without making a context in this process."""
    return visible.count()


@dataclass(frozen=True)
class Shares:
    """The fraction of a device that each vLLM engine may take, where several roles stay on it."""

    sampler: float | None
    teachers: Mapping[str, float]  # by name


class Memory(Protocol):
    """What a device can hold."""

    def whole(self, section: Teacher, spec: WorkerSpec) -> bool:
        """Whether one device can hold a whole teacher, with nothing else awake on it."""

    def shares(self, plan: Plan) -> Shares | None:
        """For a plan in which roles do not take turns; None: its devices cannot hold all roles at once."""

    def filled(self, plan: Plan) -> float:
        """What the fullest device of a plan must hold at the worst moment, as a fraction of its memory."""

    def overlaps(self, plan: Plan) -> tuple[Turn, ...]:
        """The turns of a plan in which its devices can hold who falls asleep and who wakes at once."""


def place(recipe: Recipe, devices: int, cores: int | None = None, memory: Memory | None = None) -> Plan:
    """Resolve the recipe's placement on a box with this many CUDA devices and cores.

    Without `memory` nothing is known to fit: auto does not choose colocate, the split of a partition is the
    usual one, and a teacher's ranks shard it.
    """
    cores = cores or len(os.sched_getaffinity(0))
    mode = recipe.placement.mode
    if mode == "partition":
        return _fitting(recipe, [], devices, cores, memory)
    if mode != "auto":
        return _in_mode(recipe, mode, devices, cores, memory)
    if devices == 0:
        return _in_mode(recipe, "cpu", devices, cores, memory)
    if devices < max(3, _fewest(recipe)):
        colocated = _colocated(recipe, devices, cores, memory)
        return colocated or _in_mode(recipe, "timeslice", devices, cores, memory)
    return _fitting(recipe, ["timeslice"], devices, cores, memory)


def _fitting(recipe: Recipe, modes: list[Mode], devices: int, cores: int, memory: Memory | None) -> Plan:
    """A partition with the usual split, or the first other split that fits, or one of `modes`. If nothing
    fits: what comes closest, and `doctor` says what is missing.
    """
    closest = _in_mode(recipe, "partition", devices, cores, memory)
    if memory is None:
        return closest
    least = memory.filled(closest)
    others: list[tuple[Recipe, Mode]] = [(split, "partition") for split in splits(recipe, devices)]
    for wanted, mode in (*others, *((recipe, mode) for mode in modes)):
        if least <= FULL:
            break
        with contextlib.suppress(UserError):  # a replica's devices do not divide these
            plan = _in_mode(wanted, mode, devices, cores, memory)
            if (filled := memory.filled(plan)) < least:
                closest, least = plan, filled
    return closest


def splits(recipe: Recipe, devices: int) -> list[Recipe]:
    """The recipe with every partition of the devices among the roles whose number it leaves open. First those
    that take from no role a large part of what it usually has.
    """
    p, usual, local = recipe.placement, _split(recipe, devices), len(_local(recipe))
    found = []
    for sampler in (p.sampler,) if p.sampler else range(1, devices):
        for teacher in (usual[1],) if p.teacher or not local else range(local, devices):
            learner = p.learner or devices - sampler - teacher
            if learner > 0 and sampler + teacher + learner <= devices:
                found.append((sampler, teacher, learner))
    found.sort(
        key=lambda split: sorted((had / has for had, has in zip(usual, split, strict=True) if had))[::-1]
    )
    return [
        recipe.model_copy(
            update={
                "placement": p.model_copy(
                    update={
                        "mode": "partition",
                        "sampler": sampler,
                        "teacher": teacher or None,
                        "learner": learner,
                    }
                )
            }
        )
        for sampler, teacher, learner in found
    ]


def _in_mode(recipe: Recipe, mode: Mode, devices: int, cores: int, memory: Memory | None) -> Plan:
    if mode == "colocate":
        if devices == 0:
            raise UserError(
                "placement.mode: colocate needs CUDA devices and there are none; set it to cpu or auto"
            )
        if (plan := _colocated(recipe, devices, cores, memory)) is None:
            raise UserError(
                "placement.mode: colocate: a device cannot hold all roles at once (or its memory is not "
                "known); set it to timeslice"
            )
        return plan
    if mode == "partition" and devices == 0:
        raise UserError(
            "placement.mode: partition needs CUDA devices and there are none; set it to cpu or timeslice"
        )
    if mode == "partition":
        groups = _partition(recipe, devices)
    elif mode == "timeslice" and devices > 0:
        groups = _everywhere(recipe, devices)
    else:
        p = recipe.placement
        teachers: list[list[Devices]] = [
            [()] * (1 if engine_of(t).remote else p.teacher or 1) for t in recipe.teachers
        ]
        groups = _Groups([()] * (p.sampler or 1), teachers, [()] * (p.learner or 1))
    plan = _with_whole_teachers(recipe, _plan(recipe, mode, groups, cores), memory)
    return with_overlaps(recipe, plan, memory) if plan.exclusive else plan


def _colocated(recipe: Recipe, devices: int, cores: int, memory: Memory | None) -> Plan | None:
    """Every role on every device, without turns; None: this does not fit, or is not known to."""
    plan = _plan(recipe, "colocate", _everywhere(recipe, devices), cores)
    shares = None if memory is None else memory.shares(plan)
    if shares is None:
        return None
    teachers = tuple(
        tuple(replace(rank, share=shares.teachers.get(section.name)) for rank in ranks)
        for section, ranks in zip(recipe.teachers, plan.teachers, strict=True)
    )
    samplers = tuple(replace(spec, share=shares.sampler) for spec in plan.samplers)
    return replace(plan, samplers=samplers, teachers=teachers)


def _with_whole_teachers(recipe: Recipe, plan: Plan, memory: Memory | None) -> Plan:
    """Replicas of a teacher where one device can hold it: sharded ranks wait for each other in every
    layer.
    """
    if memory is None:
        return plan
    teachers = tuple(
        tuple(replace(rank, whole=True) for rank in ranks)
        if not engine_of(section).remote
        and teacher_facts(section).our_forward
        and len(ranks) > 1
        and memory.whole(section, ranks[0])
        else ranks
        for section, ranks in zip(recipe.teachers, plan.teachers, strict=True)
    )
    return replace(plan, teachers=teachers)


def with_overlaps(recipe: Recipe, plan: Plan, memory: Memory | None) -> Plan:
    """A plan in which roles take turns, with the turns that overlap.

    Without `memory` nothing is known to fit, so none does. On a CPU all do: sleep moves nothing there, and
    every role is in memory all the time.
    """
    if not recipe.placement.overlap_turns:
        return replace(plan, overlaps=())
    on_cpu = not plan.learners[0].devices
    overlaps = TURNS if on_cpu else () if memory is None else memory.overlaps(plan)
    return replace(plan, overlaps=overlaps)


@dataclass
class _Groups:
    """The devices of every process, by role."""

    samplers: list[Devices]
    teachers: list[list[Devices]]
    learners: list[Devices]


def _everywhere(recipe: Recipe, devices: int) -> _Groups:
    """Each role on all devices."""
    numbers = list(range(devices))
    return _Groups(
        _replicas(numbers, recipe.sampler, "sampler"),
        [_replicas(numbers, t, "teacher") for t in recipe.teachers],
        [(d,) for d in numbers],
    )


def _local(recipe: Recipe) -> list[Teacher]:
    """The teachers that run here."""
    return [t for t in recipe.teachers if not engine_of(t).remote]


def _fewest(recipe: Recipe) -> int:
    """Devices that a partition needs: one a role."""
    return 2 + len(_local(recipe))


def _split(recipe: Recipe, devices: int) -> tuple[int, int, int]:
    """Devices of sampler, teachers and learner: as the recipe says, or a half, a quarter and the rest."""
    p, local = recipe.placement, _local(recipe)
    replica = devices_of_a_replica(recipe.sampler)
    sampler = p.sampler or max(replica, devices // 2 // replica * replica)
    teacher = (p.teacher or max(len(local), devices // 4)) if local else 0
    return sampler, teacher, p.learner or max(1, devices - sampler - teacher)


def _partition(recipe: Recipe, devices: int) -> _Groups:
    local, fewest = _local(recipe), _fewest(recipe)
    if devices < fewest:
        raise UserError(
            f"placement.mode: partition needs at least {fewest} CUDA devices, one a role, and there are "
            f"{devices}; set it to timeslice"
        )
    sampler, teacher, learner = _split(recipe, devices)
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
    """How many devices one replica is split over; on a CPU, how many processes."""
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


def _plan(recipe: Recipe, mode: Mode, groups: _Groups, cores: int) -> Plan:
    threads = recipe.placement.threads
    # Roles that take turns, as at max_lag 0, may each use all cores. Side by side they divide them: by need
    # on a CPU, in fixed shares where two runs must agree to the bit (another number of threads adds up in
    # another order).
    turns = mode == "timeslice" or (mode == "cpu" and recipe.max_lag == 0)
    by_need = mode == "cpu" and recipe.schedule.lag is None and not turns
    busy = [
        t for t, engine in zip(groups.teachers, recipe.teachers, strict=True) if not engine_of(engine).remote
    ]
    workers = len(groups.samplers) + sum(map(len, busy)) + len(groups.learners)

    def specs(
        role: WorkerRole,
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
