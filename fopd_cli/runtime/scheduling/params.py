"""How responses are sampled, as the recipe says: for training, and for held-out prompts."""

from __future__ import annotations

from fopd_cli.recipe import Recipe
from fopd_cli.samples import SamplingParams


def sampling_params(recipe: Recipe, evaluation: bool) -> SamplingParams:
    """How training or held-out responses are sampled. Both keep the same extras, so that they can share a
    batch.
    """
    s, e = recipe.sampler, recipe.eval
    keep = {"sampled": 0, "quadratic": 0, "topk": recipe.freshness.drift_k, "exact": -1}[recipe.drift]
    keep = keep if keep < 0 else max(keep, recipe.loss.student_k)
    draws = recipe.loss.draws if recipe.support == "mc" else 1
    if not evaluation:
        return SamplingParams(s.temperature, s.top_p, s.max_new_tokens, keep, draws)
    return SamplingParams(
        s.temperature if e.temperature is None else e.temperature,
        s.top_p if e.top_p is None else e.top_p,
        s.max_new_tokens if e.max_new_tokens is None else e.max_new_tokens,
        keep,
        draws,
    )
