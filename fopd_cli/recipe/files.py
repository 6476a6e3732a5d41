"""From a YAML file to a recipe and back: overrides, paths, and errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fopd_cli.errors import UserError
from fopd_cli.recipe.explain import fields_of, sections_of
from fopd_cli.recipe.schema import BUILT_IN_TASKS, Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, resolve paths, validate. Every problem is a `UserError` that names the key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give a recipe (for a run directory use `fopd resume`)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(fields_of(Recipe))}")
    for override in overrides:
        _set(raw, override)
    _resolve_paths(raw, path.resolve().parent)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain_error(e, raw) for e in error.errors()]
        raise UserError(f"{path}: " + "; ".join(dict.fromkeys(lines))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: write key=value, for example --set learner.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    node = raw
    *parents, last = key.split(".")
    for i, part in enumerate(parents):
        child = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if isinstance(child, list):
            _set_item(child, [*parents[i + 1 :], last], value, override)
            return
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {'.'.join(parents[: i + 1])} is no section")
        node = child
    node[last] = parsed


def _set_item(items: list[Any], path: list[str], value: str, override: str) -> None:
    """One of several teachers, by its number or name: teacher.0.k=8, teacher.maths.k=8."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    index = int(path[0]) if path[0].isdigit() else names.index(path[0]) if path[0] in names else len(items)
    if index >= len(items) or len(path) < 2 or not isinstance(items[index], dict):
        raise UserError(
            f"--set {override!r}: there are {len(items)} of them; name one by number or name, as in teacher.0.k=8"
        )
    _set(items[index], f"{'.'.join(path[1:])}={value}")


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Paths beside the recipe win over paths in the current directory; what exists in neither stays as it is."""
    for section, keys in (("student", ("model",)), ("teacher", ("model",)), ("task", ("train", "eval", "scaffold"))):
        found = raw.get(section)
        for values in found if isinstance(found, list) else [found]:
            if isinstance(values, dict) and values.get("engine") != "http":
                for key in keys:
                    values.update(_resolved(values, key, folder))


def _resolved(values: dict[str, Any], key: str, folder: Path) -> dict[str, str]:
    value = values.get(key)
    if isinstance(value, str) and not value.startswith("hf:"):
        for base in (folder, Path.cwd()):
            candidate = base / Path(value).expanduser()
            if candidate.exists():
                return {key: str(candidate.resolve())}
    return {}


def _explain_error(error: Any, raw: dict[str, Any]) -> str:
    numbered = isinstance(raw.get("teacher"), list)  # a single teacher is a list of one only to pydantic
    tags = (*BUILT_IN_TASKS, "plugin")
    loc = [str(part) for part in error["loc"] if part not in tags and (numbered or not isinstance(part, int))]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1], error["loc"])
        near = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    got = error.get("input")
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, but it is {got!r} ({type(got).__name__})"


def _known_keys(parents: list[str], loc: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in parents:
        if not part.isdigit():
            model = sections_of(fields_of(model)[part].annotation, loc)[0]
    return list(fields_of(model))
