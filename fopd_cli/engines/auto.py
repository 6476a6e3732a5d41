"""Resolves `engine: auto` once: which engines run a recipe's sampler and teachers on this machine."""

from __future__ import annotations

from collections.abc import Callable

from fopd_cli.engines.models import hf
from fopd_cli.engines.record import Engine
from fopd_cli.engines.registry import AUTO, candidates, unfit_to_sample, unfit_to_teach
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, Sampler, Teacher

Unfit = Callable[[Engine, Recipe], str | None]


def resolved(recipe: Recipe, cuda: bool) -> tuple[Recipe, str | None]:
    """The recipe with every engine named, and one line that says what was chosen and why (None if nothing was
    left open). `cuda`: whether there is a CUDA device.
    """
    said: list[str] = []

    def settle(section: Sampler | Teacher, key: str, model: str, unfit: Unfit) -> Sampler | Teacher:
        if section.engine != AUTO:
            return section
        against = {
            engine.name: unfit(engine, recipe) or _unready(engine, section, key, model, cuda)
            for engine in candidates(section)
        }
        # If none is ready, take the first that would do: doctor says what it lacks.
        able = (engine.name for engine in candidates(section) if unfit(engine, recipe) is None)
        name = next((name for name, why in against.items() if why is None), None) or next(able)
        why = next((f" ({why})" for why in against.values() if why is not None), "")
        said.append(f"{key}.engine: {AUTO} -> {name}{'' if name == next(iter(against)) else why}")
        return section.model_copy(update={"engine": name})

    keys = [f"teacher.{t.name}" if len(recipe.teachers) > 1 else "teacher" for t in recipe.teachers]
    update = {
        "sampler": settle(recipe.sampler, "sampler", recipe.student.model, unfit_to_sample),
        "teachers": tuple(
            settle(t, key, t.model, unfit_to_teach) for t, key in zip(recipe.teachers, keys, strict=True)
        ),
    }
    return recipe.model_copy(update=update), "; ".join(said) or None


def _unready(engine: Engine, section: Sampler | Teacher, key: str, model: str, cuda: bool) -> str | None:
    """Why this engine cannot be used here; None if it can."""
    if engine.cuda and not cuda:
        return "no CUDA device"
    if (missing := engine.build.missing()) is not None:
        return missing
    try:
        config = hf.load_config(model, f"{key}.model")
    except UserError:  # reported in full when the run's inputs are read
        return None
    return next((what for what, _ in engine.build.refusals(key, section, config)), None)
