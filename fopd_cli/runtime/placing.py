"""Placement on this machine: its devices, their memory, and the shapes of the recipe's models."""

from __future__ import annotations

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf
from fopd_cli.engines.models.shapes import shapes
from fopd_cli.engines.registry import engine_of
from fopd_cli.recipe import Recipe
from fopd_cli.runtime import devices
from fopd_cli.runtime.build import add_adapters
from fopd_cli.runtime.memory.model import Fit, Models
from fopd_cli.runtime.placement import Plan, place

PROMPT = 1024  # tokens assumed for the longest prompt, before prompts are read


def placed(recipe: Recipe) -> Plan:
    """Where a recipe runs here. Raises `UserError` if it cannot, or if a model's configuration cannot be
    read.
    """
    count = devices.count()
    return place(recipe, count, memory=fit(recipe, count) if count else None)


def fit(recipe: Recipe, count: int, known: Models | None = None) -> Fit | None:
    """What the smallest of `count` devices can hold; None unless all report their memory. `known`: the
    recipe's models, where the length of its prompts is known.
    """
    sizes = [devices.memory(d) for d in range(count)]
    reported = [size for size in sizes if size is not None]
    return Fit(recipe, known or models(recipe), min(reported)) if len(reported) == count else None


def models(recipe: Recipe, prompt: int = PROMPT, told: int | None = None) -> Models:
    """The shapes of all models that run here. `prompt` and `told` are the tokens of the longest prompt, as
    the student and as a teacher reads it.
    """
    config = hf.load_config(recipe.student.model, "student.model")
    trainable = None
    if recipe.student.lora is not None:
        model = hf.empty_model(config)
        add_adapters(model, recipe, hf.DTYPES["fp32"])
        trainable = sum(tensor.numel() for _, tensor in lora.adapters(model))
    response = max(recipe.sampler.max_new_tokens, recipe.eval.max_new_tokens or 0)
    return Models(
        shapes(config),
        {
            t.name: shapes(hf.load_config(t.model, "teacher.model"))
            for t in recipe.teachers
            if not engine_of(t).remote
        },
        prompt + response,
        (prompt if told is None else told) + response,
        trainable,
    )
