"""A recipe's prompts if they are on this machine, else a guess. A plan downloads nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fopd_cli import paths
from fopd_cli.engines.models import hf
from fopd_cli.plan.lengths import Lengths, log_normal, spread
from fopd_cli.recipe import PluginTask, Recipe
from fopd_cli.runtime.build import student_frame, task_arguments
from fopd_cli.runtime.scheduling.prompts import PromptStream
from fopd_cli.tasks import load_task

LOOKED_AT = 200
GUESS = 256, 1024  # mean and largest
HELD_OUT = 256
HUB = "hf:"


@dataclass(frozen=True)
class Prompts:
    """Prompt lengths as the student reads them, and the number of held-out prompts."""

    lengths: Lengths
    held_out: int
    assumed: bool = False


def of_stream(stream: PromptStream) -> Prompts:
    """From prompts that were read: an evenly spaced selection, so that a large file takes no longer."""
    kept = stream.kept["train"]
    chosen = np.linspace(0, len(kept) - 1, min(LOOKED_AT, len(kept))).astype(int)
    found = [max(1, stream.tokens("train", kept[i], judged=False)) for i in chosen]
    return Prompts(spread(found, "the task's own"), len(stream.kept["eval"]))


def of_recipe(recipe: Recipe) -> Prompts:
    """Raises `UserError` for data or a tokenizer that cannot be read."""
    # A source is a string, or a mapping of names to strings.
    elsewhere = any(HUB in str(getattr(recipe.task, key, None)) for key in ("train", "eval"))
    if isinstance(recipe.task, PluginTask) or elsewhere or not paths.is_dir(recipe.student.model):
        held_out = getattr(recipe.task, "eval_prompts", None) or HELD_OUT
        return Prompts(log_normal(*GUESS, "a guess: the data was not read"), held_out, assumed=True)
    task = load_task(*task_arguments(recipe))
    tokenizer = hf.load_tokenizer(recipe.student.model, "student.model")
    frame, spp = student_frame(recipe, tokenizer), recipe.sampler.samples_per_prompt
    return of_stream(PromptStream(task, frame, recipe.seed, spp, recipe.teachers))
