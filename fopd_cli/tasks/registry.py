"""From a recipe's task section to a task: a built-in name, or `package.module:Class` for a user's own."""

from __future__ import annotations

import importlib
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.tasks.base import Task

BUILT_IN = {
    "arithmetic": "fopd_cli.tasks.arithmetic:Arithmetic",
    "chat": "fopd_cli.tasks.chat:Chat",
    "math": "fopd_cli.tasks.math:Math",
    "swe": "fopd_cli.tasks.swe.task:Swe",
    "tool": "fopd_cli.tasks.tool:Tool",
}


def load_task(name: str, options: dict[str, Any]) -> Task:
    """Build the task; `options` are the recipe's keys. A plug-in that cannot be imported is the user's mistake."""
    module_name, _, attribute = BUILT_IN.get(name, name).partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.name: cannot import {name!r}: {error}; write package.module:Class") from None
    try:
        task = factory(**options)
    except TypeError as error:
        raise UserError(f"task: {name!r} does not take these options: {error}") from None
    for method in ("prompts", "grade"):
        if not callable(getattr(task, method, None)):
            raise UserError(f"task.name: {name!r} has no method {method}(); see fopd_cli/tasks/base.py")
    return task
