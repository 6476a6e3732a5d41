"""From the command's options to a plan."""

from __future__ import annotations

from pathlib import Path

from fopd_cli.engines import auto
from fopd_cli.engines.registry import engine_of
from fopd_cli.inputs import Inputs, check_model_name
from fopd_cli.plan import hardware
from fopd_cli.plan.forecast import Forecast, Setting, calibrated, forecast, guessed, measured_prompt
from fopd_cli.plan.lengths import given, log_normal
from fopd_cli.plan.page import line
from fopd_cli.plan.prompts import Prompts, of_recipe, of_stream
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.placing import models as models_of

SHORT = 6  # optimizer steps that are simulated before a run


def plan(
    recipe: Recipe,
    devices: int | None = None,
    device: str | None = None,
    gigabytes: float | None = None,
    lengths: str | None = None,
    run: Path | None = None,
) -> tuple[Forecast, str | None]:
    """A forecast of the recipe's run, and what `engine: auto` became. Raises `UserError`."""
    there = hardware.chosen(device, devices, gigabytes, recipe.learner.dtype == "bf16")
    check_model_name(recipe.student.model, "student.model")
    for teacher in recipe.teachers:
        if not engine_of(teacher).remote:
            check_model_name(teacher.model, "teacher.model")
    recipe, chosen = auto.resolved(recipe, not there.cpu)
    known = None if run is None else calibrated(run, recipe, there)
    prompts = of_recipe(recipe)
    if prompts.assumed and known is not None:
        mean = measured_prompt(known.steps, known.batch)
        guess = log_normal(mean, round(3 * mean), f"as in {known.path}")
        prompts = Prompts(guess, prompts.held_out, assumed=True)
    if lengths is not None:
        responses = given(lengths, recipe.sampler.max_new_tokens)
    elif known is not None:
        responses = known.responses.at_most(recipe.sampler.max_new_tokens)
    else:
        responses = guessed(recipe)
    here = there.cpu or (device is None and devices is None and gigabytes is None)
    models = models_of(recipe, prompts.lengths.most)
    return forecast(recipe, Setting(there, models, responses, prompts, known, here)), chosen


def before_a_run(inputs: Inputs) -> str:
    """The one-line plan of a run that is about to start here."""
    recipe, prompts = inputs.recipe, of_stream(inputs.stream)
    models = models_of(recipe, prompts.lengths.most)
    there = hardware.here(recipe.learner.dtype == "bf16")
    setting = Setting(there, models, guessed(recipe), prompts, here=True)
    return line(forecast(recipe, setting, inputs.plan, SHORT))
