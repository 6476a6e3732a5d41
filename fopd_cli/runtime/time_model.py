"""How long an optimizer step takes each role, by arithmetic; none of it was measured on a GPU.

A device has peak rates of floating-point operations and of bytes read, of which real work reaches a fraction.
Training and judging are counted in operations, sampling in bytes: every decoding step of a running batch
reads all weights once, and each row's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from fopd_cli.recipe import Recipe
from fopd_cli.runtime.memory.model import Models, Use, workers
from fopd_cli.runtime.placement import Plan


@dataclass(frozen=True)
class Device:
    """A device's peak rates per second, and the fraction of each that we count on."""

    name: str = "H100 SXM"
    flops: float = 989e12  # dense bf16
    bandwidth: float = 3.35e12  # bytes
    host: float = 25e9  # bytes, to or from pinned main memory
    training: float = 0.35  # of flops
    judging: float = 0.45
    reading: float = 0.6  # of bandwidth


@dataclass(frozen=True)
class Pace:
    """Seconds per step of each role; `step` is what a run takes for one, once all roles are busy."""

    sampler: float
    teacher: float
    learner: float
    publish: float
    step: float


def learner_flops(recipe: Recipe, models: Models, tokens: int) -> float:
    """FLOP of forward and backward passes on `tokens` tokens; with checkpointing, one more forward. With
    adapters, whose own products are small, gradients are only passed on.
    """
    passes = 8 if recipe.learner.activation_checkpointing else 6
    if models.trainable is not None:
        passes -= 2  # frozen weights have no gradients of their own
    heads = sum(2 * s.head for s in models.teachers.values()) / max(1, len(models.teachers))
    return tokens * (passes * models.student.active + heads)


def pace(
    recipe: Recipe, plan: Plan, models: Models, response: int, device_bytes: int, device: Device | None = None
) -> Pace:
    """The pace of a plan on CUDA devices, with responses of `response` tokens on average."""
    d = device or Device()
    batch = recipe.learner.batch_samples
    tokens = batch * (models.prompt // 2 + response)
    learners = max(1, len({x for w in plan.learners for x in w.devices}))
    learn = learner_flops(recipe, models, tokens) / (learners * d.flops * d.training)
    judge = 0.0
    for section, ranks in zip(recipe.teachers, plan.teachers, strict=True):
        if section.name in models.teachers:
            there = max(1, len({x for w in ranks for x in w.devices}))
            flops = 2 * models.teachers[section.name].active * tokens / len(recipe.teachers)
            judge += flops / (there * d.flops * d.judging)
    found = {w.spec.name: w.use for w in workers(recipe, plan, models, device_bytes)}
    made = sum(_tokens_a_second(recipe, models, found[s.name], len(s.devices), d) for s in plan.samplers)
    sample = batch * response / made
    publish = 2 * 2 * models.student.parameters / d.host  # to main memory, and from there
    roles = (sample, judge, learn + publish)
    return Pace(sample, judge, learn, publish, sum(roles) if plan.shared else max(roles))


def at_peak(recipe: Recipe, plan: Plan, models: Models, flops: float) -> dict[str, float]:
    """Seconds that a token would take each worker at `flops` per second and device: model FLOP, without
    passes that are computed again. The learner's first rank stands for all; workers on a CPU are left out.
    """
    learning = recipe.learner.model_copy(update={"activation_checkpointing": False})
    once = recipe.model_copy(update={"learner": learning})
    work = {
        plan.learners[0].name: (learner_flops(once, models, 1), [d for w in plan.learners for d in w.devices])
    }
    for section, ranks in zip(recipe.teachers, plan.teachers, strict=True):
        if section.name in models.teachers:
            work |= {r.name: (2.0 * models.teachers[section.name].active, list(r.devices)) for r in ranks}
    work |= {s.name: (2.0 * models.student.active, list(s.devices)) for s in plan.samplers}
    return {name: need / (len(set(on)) * flops) for name, (need, on) in work.items() if on}


def _tokens_a_second(recipe: Recipe, models: Models, use: Use, devices: int, d: Device) -> float:
    """For one replica: as many rows run at once as its cache holds at half their full length."""
    s, size = models.student, 2
    rows = min(recipe.sampler.concurrency, max(1.0, 2 * use.rows)) if use.rows else recipe.sampler.concurrency
    read = size * s.parameters + rows * size * s.kv * models.longest / 2
    return rows * devices * d.bandwidth * d.reading / read
