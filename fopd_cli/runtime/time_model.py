"""What a device does per second and what a token costs, by arithmetic: for plans and for MFU.

A device has peak rates of floating-point operations and of bytes read, of which real work reaches a fraction;
the fractions were not measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from fopd_cli.recipe import Recipe
from fopd_cli.runtime.memory.model import Models
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


def learner_flops(recipe: Recipe, models: Models, tokens: int) -> float:
    """FLOP of forward and backward passes on `tokens` tokens; with checkpointing, one more forward. With
    adapters, whose own products are small, gradients are only passed on.
    """
    passes = 8 if recipe.learner.activation_checkpointing else 6
    if models.trainable is not None:
        passes -= 2  # frozen weights have no gradients of their own
    heads = sum(2 * s.head for s in models.teachers.values()) / max(1, len(models.teachers))
    return tokens * (passes * models.student.active + heads)


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
