"""The best split of the devices, and the smallest lag that does not slow it down.

All splits are ranked by a formula, and the top ones are simulated, because a formula knows nothing about
stragglers, groups that fill up, or roles that wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fopd_cli.errors import UserError
from fopd_cli.plan.cost import Costs
from fopd_cli.plan.forecast import Forecast, Setting, forecast, sampling
from fopd_cli.plan.lags import LAG_KEY, with_lag
from fopd_cli.recipe import Recipe
from fopd_cli.recipe.contradictions import contradictions
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.placement import Plan, splits

LAGS = (1, 2, 4, 8)
SIMULATED = 3  # splits
MEASURED = 8  # optimizer steps per simulation
AS_GOOD = 1.03  # a lag this close to the fastest counts as good
BETTER = 0.97


@dataclass(frozen=True)
class Best:
    """The fastest split and lag found, and the settings for them."""

    forecast: Forecast
    settings: tuple[str, ...]  # KEY=VALUE; empty: the recipe is as good as any
    splits: int  # number that fit
    simulated: int  # number of splits and lags


def best(as_is: Forecast) -> Best:
    """The best split and lag; the recipe's own split unless another is more than 3% faster."""
    recipe, setting = as_is.recipe, as_is.setting
    front = as_is if as_is.fits or setting.hardware.cpu else None
    others, fitting = _splits(as_is)
    tried = [forecast(r, setting, plan, MEASURED) for r, plan in others]
    for one in tried:
        if front is None or one.outcome.seconds < BETTER * front.outcome.seconds:
            front = one
    if front is None:
        return Best(as_is, (), fitting, len(tried))
    lags = [forecast(r, setting, None, MEASURED) for r in _lags(front.recipe)]
    lags = [one for one in [front, *lags] if one.fits or setting.hardware.cpu]
    fastest = min(one.outcome.seconds for one in lags)
    good = [one for one in lags if one.outcome.seconds <= AS_GOOD * fastest]
    least = min(good, key=lambda one: one.recipe.max_lag)
    return Best(least, _settings(recipe, least.recipe), fitting, len(tried) + len(lags) - 1)


def _splits(as_is: Forecast) -> tuple[list[tuple[Recipe, Plan]], int]:
    """The best splits by formula other than the recipe's own, and how many fit."""
    setting = as_is.setting
    found, seen = [], {_where(as_is.plan)}
    for recipe in _placements(as_is.recipe, setting.hardware.count):
        try:
            plan = setting.placed(recipe)
        except UserError:  # a replica's devices do not divide these
            continue
        workers = memory.workers(recipe, plan, setting.models, setting.hardware.nbytes)
        if _where(plan) in seen or not memory.fits(memory.demands(plan, workers), setting.hardware.nbytes):
            continue
        seen.add(_where(plan))
        found.append((estimate(recipe, plan, setting, setting.costs(recipe, plan)), recipe, plan))
    found.sort(key=lambda one: one[0])
    return [(recipe, plan) for _, recipe, plan in found[:SIMULATED]], len(found) + as_is.fits


def _where(plan: Plan) -> tuple[str, int, int, int]:
    return plan.mode, len(plan.samplers), sum(map(len, plan.teachers)), len(plan.learners)


def _placements(recipe: Recipe, count: int) -> Iterator[Recipe]:
    if count == 0:
        return
    for mode in ("colocate", "timeslice"):
        yield _placed(recipe, mode)
    yield from splits(_placed(recipe, "partition"), count)


def _placed(recipe: Recipe, mode: str) -> Recipe:
    """The recipe in another mode, with no device given to a role yet."""
    update = {"mode": mode, "sampler": None, "teacher": None, "learner": None}
    return recipe.model_copy(update={"placement": recipe.placement.model_copy(update=update)})


def _lags(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with other largest lags, if they are valid."""
    for lag in () if recipe.schedule.lag is not None else LAGS:
        other = with_lag(recipe, lag)
        if lag != recipe.max_lag and not list(contradictions(other)):
            yield other


def estimate(recipe: Recipe, plan: Plan, setting: Setting, costs: Costs) -> float:
    """Seconds of a step by formula: those of the slowest role, or the sum of all roles where they share
    devices or the lag is 0.
    """
    batch = recipe.learner.batch_samples
    tokens = batch * (setting.prompts.lengths.mean + setting.responses.mean)
    sample = sampling(recipe, plan, costs, setting.responses, batch)
    judge = sum(
        call.seconds(tokens / len(plan.teachers) / len(ranks))
        for call, ranks in zip(costs.scoring, plan.teachers, strict=True)
    )
    learn = costs.training.seconds(tokens / len(plan.learners))
    roles = (sample, judge, learn)
    return sum(roles) + costs.publish if plan.shared or recipe.max_lag == 0 else max(roles)


def _settings(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """The settings that turn `before` into `after`."""
    found = []
    for section, keys in (("placement", ("mode", "sampler", "teacher", "learner")), ("schedule", (LAG_KEY,))):
        one, other = getattr(before, section), getattr(after, section)
        for key in keys:
            if getattr(one, key) != getattr(other, key):
                value = getattr(other, key)
                found.append(f"{section}.{key}={'null' if value is None else value}")
    return tuple(found)
