"""From a recipe's task section to a task: a built-in name, or `package.module:Class` for the user's own."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.recipe import BUILT_IN_TASKS
from fopd_cli.tasks.base import Task
from fopd_cli.tasks.guard import Guarded, blamed

BUILT_IN = {
    "arithmetic": "fopd_cli.tasks.arithmetic:Arithmetic",
    "chat": "fopd_cli.tasks.chat:Chat",
    "math": "fopd_cli.tasks.math:Math",
    "swe": "fopd_cli.tasks.swe.task:Swe",
    "tool": "fopd_cli.tasks.tool:Tool",
}


def load_task(name: str, options: dict[str, Any], folder: str | None = None) -> Task:
    """Build the task; `options` are the recipe's keys. Built-in tasks take their section of the recipe,
    plug-ins keyword arguments. A plug-in's module is looked up in `folder` first; anything wrong with it is a
    `UserError` that says where.
    """
    module_name, _, attribute = BUILT_IN.get(name, name).partition(":")
    if name in BUILT_IN:
        section = BUILT_IN_TASKS[name].model_validate({"name": name, **options})
        built_in: Task = getattr(importlib.import_module(module_name), attribute)(section)
        return built_in
    if folder is not None and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        looked = f"neither beside the recipe, nor in {Path.cwd()}, nor among the installed packages"
        raise UserError(f"task.name: cannot import {name!r}: {error}; it was found {looked}") from None
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.name: cannot import {name!r}: {error}; write package.module:Class") from None
    except Exception as error:
        raise blamed(error, name, "its import") from error
    try:
        task = factory(**options)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # from the call itself
            raise UserError(f"task.options: {name!r} does not take these options: {error}") from None
        raise blamed(error, name, "its constructor") from error
    except Exception as error:
        raise blamed(error, name, "its constructor") from error
    for method in ("prompts", "grade"):
        if not callable(getattr(task, method, None)):
            raise UserError(f"task.name: {name!r} has no method {method}(); see fopd_cli/tasks/base.py")
    guarded: Any = Guarded(task, name)
    return guarded
