"""The recipe: `schema.py` has every key, its type, its default and its meaning. Importing this imports no
torch.

A recipe is YAML. Unknown keys are errors; `--set a.b=c` overrides one key; relative paths are looked up
beside the recipe first, then in the current directory. The run directory gets the recipe with every
default filled in.
"""

from fopd_cli.recipe import changes
from fopd_cli.recipe.explain import explain
from fopd_cli.recipe.files import dump_recipe, load_recipe, recorded_recipe
from fopd_cli.recipe.schema import (
    BUILT_IN_TASKS,
    ArithmeticTask,
    ChatTask,
    Freshness,
    Labels,
    Learner,
    Lora,
    Loss,
    MathTask,
    Placement,
    PluginTask,
    Prompts,
    Recipe,
    Sampler,
    SweTask,
    Teacher,
    ToolTask,
    Vllm,
)

__all__ = [
    "BUILT_IN_TASKS",
    "ArithmeticTask",
    "ChatTask",
    "Freshness",
    "Labels",
    "Learner",
    "Lora",
    "Loss",
    "MathTask",
    "Placement",
    "PluginTask",
    "Prompts",
    "Recipe",
    "Sampler",
    "SweTask",
    "Teacher",
    "ToolTask",
    "Vllm",
    "changes",
    "dump_recipe",
    "explain",
    "load_recipe",
    "recorded_recipe",
]
