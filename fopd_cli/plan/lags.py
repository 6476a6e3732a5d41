"""How plans change a recipe's largest lag."""

from __future__ import annotations

from fopd_cli.recipe import Recipe

LAG_KEY = "max_lag"  # of the schedule section: how many steps sampling may run ahead


def with_lag(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another largest lag, or another fixed lag if it has one. Not validated."""
    key = LAG_KEY if recipe.schedule.lag is None else "lag"
    return recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={key: steps})})
