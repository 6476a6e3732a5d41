"""The schema as text: what `fopd recipe --explain` prints, and which keys there are."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

from fopd_cli.recipe.schema import BUILT_IN_TASKS, PluginTask, Recipe


def explain() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, in the order of the schema."""
    yield from _explain(Recipe, "")


def _explain(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in fields_of(model).items():
        sections = sections_of(field.annotation)
        if sections:
            for section in sections:
                label = (
                    f"{prefix}{name}." if len(sections) == 1 else f"{prefix}{name}[{_task_name(section)}]."
                )
                yield from _explain(section, label)
            continue
        default = (
            "required"
            if field.is_required()
            else yaml.safe_dump(_plain(field.default), default_flow_style=True)
        )
        yield (
            prefix + name,
            _type_name(field.annotation),
            default.removesuffix("...\n").strip(),
            " ".join((field.description or "").split()),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _task_name(section: type[BaseModel]) -> str:
    return next((name for name, own in BUILT_IN_TASKS.items() if own is section), "your own")


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Ellipsis:
        return "..."
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return str(getattr(annotation, "__name__", annotation))


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    """Fields by the names that recipes use."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def sections_of(annotation: Any, loc: tuple[Any, ...] = ()) -> list[type[BaseModel]]:
    """The sections that a field's type can hold (several for the task)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    models = [m for arg in typing.get_args(annotation) for m in sections_of(arg, loc)]
    tagged: dict[str, Any] = {**BUILT_IN_TASKS, "plugin": PluginTask}
    for tag, model in tagged.items():
        if tag in loc and model in models:
            return [model]
    return models
