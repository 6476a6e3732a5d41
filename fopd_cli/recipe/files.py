"""From a YAML file to a recipe and back: overrides, paths, and errors that name the key."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fopd_cli import paths
from fopd_cli.engines.registry import ENGINES
from fopd_cli.errors import UserError
from fopd_cli.recipe import renames
from fopd_cli.recipe.explain import fields_of, sections_of
from fopd_cli.recipe.meant import meant, near_value
from fopd_cli.recipe.plain import NotPlain, NotYaml, parse, shown, shown_key
from fopd_cli.recipe.schema import Recipe

REMOTE = [name for name, engine in ENGINES.items() if engine.remote]  # their models are not local paths
MOST_PROBLEMS = 4  # in one message
PATHS = ("path", "file", "folder", "dir", "directory")  # endings of keys that name a path
LONG_KEY = 60  # characters: longer ones are not typos


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, resolve paths, validate. Any problem in the file is a `UserError` naming the key."""
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe{paths.similar(path)}") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a directory; give a recipe (for a run directory use `fopd resume`)"
        ) from None
    except NotPlain as problem:
        raise UserError(f"{path}: {problem}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null byte
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(fields_of(Recipe))}")
    for old in renames.rename(raw, str(path)):
        renames.note_once(str(path), old)
    for override in overrides:
        _set_renamed(raw, override, overrides)
    _resolve_paths(raw, path.resolve().parent)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_explained(error, raw)}") from None


def recorded_recipe(dumped: dict[str, Any], where: Path) -> Recipe:
    """The recipe in a checkpoint, which is complete and resolved."""
    renames.rename(dumped, str(where))
    try:
        return Recipe.model_validate(dumped)
    except ValidationError as error:
        raise UserError(
            f"{where}: its recipe was written by another version of fopd: {_explained(error, dumped)}"
        ) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults filled in."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set_renamed(raw: dict[str, Any], override: str, others: Sequence[str]) -> None:
    """`_set`, for keys by their present or their old name; whole sections, as in schedule={depth: 2}, too."""
    now, found = renames.rename_override(override, others)
    _set(raw, now)
    for old in [*found, *renames.rename(raw, f"--set {shown(override)}")]:
        renames.note(f"--set {shown(override)}", old)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {shown(override)}: write key=value, for example --set learner.steps=100")
    try:
        parsed = parse(value)
    except NotYaml:
        parsed = value
    except NotPlain as problem:
        raise UserError(f"--set {shown(override)}: {problem}") from None
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
            raise UserError(f"--set {shown(override)}: {'.'.join(parents[: i + 1])} is not a section")
        node = child
    node[last] = parsed


def _set_item(items: list[Any], path: list[str], value: str, override: str) -> None:
    """One of several teachers, by its number or name: teacher.0.k=8, teacher.maths.k=8."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    numbered = path[0].isdecimal() and len(path[0]) < 10
    index = int(path[0]) if numbered else names.index(path[0]) if path[0] in names else len(items)
    if index >= len(items) or len(path) < 2 or not isinstance(items[index], dict):
        raise UserError(
            f"--set {shown(override)}: there are {len(items)} of them; say which one, by number or "
            "name, as in teacher.0.k=8"
        )
    _set(items[index], f"{'.'.join(path[1:])}={value}")


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Paths beside the recipe win over paths in the current directory; what is in neither is unchanged."""
    for section, keys in (
        ("student", ("model",)),
        ("teacher", ("model",)),
        ("task", ("train", "eval", "scaffold")),
    ):
        found = raw.get(section)
        for values in found if isinstance(found, list) else [found]:
            if isinstance(values, dict) and values.get("engine") not in REMOTE:
                for key in keys:
                    values.update(_resolved(values, key, folder))
                    if isinstance(named := values.get(key), dict):  # held-out sets by name
                        for name in list(named):
                            named.update(_resolved(named, name, folder))
    task = raw.get("task")
    if isinstance(task, dict) and ":" in str(task.get("name")):
        _resolve_plugin(task, folder)


def _resolve_plugin(task: dict[str, Any], folder: Path) -> None:
    """Resolve the folder of the user's own task, and the files that its options name."""
    module = str(task["name"]).partition(":")[0].split(".")[0]
    if "path" not in task:
        with contextlib.suppress(OSError, ValueError):
            for base in (folder, Path()):
                if (base / f"{module}.py").is_file() or (base / module).is_dir():
                    task["path"] = str(base.resolve())
                    break
    else:
        task.update(_resolved(task, "path", folder))
    options = task.get("options")
    if not isinstance(options, dict):
        return
    for key in list(options):
        found = _resolved(options, key, folder)
        named = key.lower().endswith(PATHS)
        if found and (named or Path(found[key]).is_file()):
            options.update(found)


def _resolved(values: dict[str, Any], key: str, folder: Path) -> dict[str, str]:
    value = values.get(key)
    if isinstance(value, str) and not value.startswith("hf:"):
        for base in (folder, Path()):
            # not a path, or in the home of a user who does not exist
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                candidate = base / Path(value).expanduser()
                if (
                    key == "model"
                    and (candidate / "recipe.yaml").is_file()
                    and (candidate / "student").is_dir()
                ):
                    candidate = candidate / "student"  # a run directory stands for its student
                if candidate.exists():
                    return {key: str(candidate.resolve())}
    return {}


def _explained(error: ValidationError, raw: dict[str, Any]) -> str:
    """The first few problems, and how many more there are."""
    found = error.errors(include_url=False, include_context=False)
    lines = list(dict.fromkeys(_explain_error(e, raw) for e in found[:MOST_PROBLEMS]))
    if len(found) > MOST_PROBLEMS:
        lines.append(f"and {len(found) - MOST_PROBLEMS} more problems")
    return "; ".join(lines)


def _explain_error(error: Any, raw: dict[str, Any]) -> str:
    parts, known = _place(error["loc"], numbered=isinstance(raw.get("teacher"), list))
    if error["type"] == "extra_forbidden":
        unknown = str(error["loc"][-1])
        near = meant(unknown, parts) if len(unknown) < LONG_KEY else None
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{shown_key('.'.join([*parts, unknown]))}: unknown key; {hint}"
    key = shown_key(".".join(parts))
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] == "value_error":
        said = str(error["msg"]).removeprefix("Value error, ")
        return f"{key}: {said}" if key else said
    got = error.get("input")
    hint = ""
    if error["type"] == "literal_error" and isinstance(got, str):
        hint = near_value(got, re.findall(r"'([^']*)'", error["msg"]))
    return (
        f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, but it is {shown(got)} "
        f"({type(got).__name__}){hint}"
    )


def _place(loc: tuple[Any, ...], numbered: bool) -> tuple[list[str], list[str]]:
    """(the key's parts, the known keys) at pydantic's `loc`, which also names the members of unions.

    `numbered`: there are several teachers. To pydantic, a single one is a list, too.
    """
    parts: list[str] = []
    model: type[BaseModel] | None = Recipe
    for part in loc:
        if model is not None and part in (fields := fields_of(model)):
            parts.append(str(part))
            inner = sections_of(fields[part].annotation, loc)
            model = inner[0] if inner else None
        elif isinstance(part, int) and (numbered or parts != ["teacher"]):
            parts.append(str(part))
    return parts, [] if model is None else list(fields_of(model))
