"""The differences between two recipes, key by key, and what they mean for a run that continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fopd_cli.recipe.schema import Recipe

Flat = dict[str, Any]
# A run's identity. With other values, the weights and samples of a checkpoint would mean something else.
IDENTITY = ("student.", "task.", "seed", "sampler.samples_per_prompt", "eval.follow")
# A teacher's identity and inputs, which may not change between two starts; its engine and devices may.
OF_TEACHERS = ("name", "model", "k", "dtype", "context")
# The keys that decide what a teacher hands over for each token.
HANDED_OVER = ("loss.support", "loss.teacher_temperature", "teacher.targets", "teacher.engine")


def flat(recipe: Recipe) -> Flat:
    """Every key with its value as JSON; several teachers are numbered, as in `teacher.0.k`."""
    return flattened(recipe.model_dump(mode="json"))


def flattened(dumped: Mapping[str, Any]) -> Flat:
    """The same for a dumped recipe, of whatever version."""
    return dict(_flat(dict(dumped), ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        value = {str(i): v for i, v in enumerate(value)}
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which the two differ, with both values; a missing key is null."""
    keys = dict.fromkeys([*old, *new])
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def refused(old: Recipe, new: Recipe) -> list[str]:
    """Changed keys with which a run cannot continue."""
    found = changes(flat(old), flat(new))
    keys = [k for k in found if k.startswith(IDENTITY) or _of_teacher(k)]
    if old.targets != new.targets:
        keys += [k for k in found if _without_number(k) in HANDED_OVER]
    return keys


def _of_teacher(key: str) -> bool:
    section, _, rest = _without_number(key).partition(".")
    return section == "teacher" and rest in OF_TEACHERS


def _without_number(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def invalidated(old: Recipe, new: Recipe) -> list[str]:
    """Changed keys that samples in flight depend on; these have to be sampled again."""
    before, after = _making(old), _making(new)
    keys = [key for key in before if before[key] != after[key]]
    if "schedule.lag" not in keys and new.max_lag < old.max_lag:
        keys.append("schedule.max_lag")  # some samples may be older than it allows; a larger one suits all
    return keys


def _making(recipe: Recipe) -> Flat:
    """What a sample in flight depends on. Keys whose default follows others appear as they resolve."""
    return {
        "sampler.temperature": recipe.sampler.temperature,
        "sampler.top_p": recipe.sampler.top_p,
        "sampler.max_new_tokens": recipe.sampler.max_new_tokens,
        "learner.batch_samples": recipe.learner.batch_samples,
        "loss.draws": recipe.loss.draws if recipe.support == "mc" else 1,
        "loss.student_k": recipe.loss.student_k,
        "freshness.drift": recipe.drift,
        "freshness.drift_k": recipe.freshness.drift_k if recipe.drift == "topk" else None,
        "freshness.reexecute.share": recipe.freshness.reexecute.share > 0,
        "schedule.lag": recipe.schedule.lag,
    }


def as_override(key: str, value: Any) -> str:
    """The same change as an argument of --set."""
    return f"{key}={json.dumps(value)}"
