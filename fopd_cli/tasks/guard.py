"""Wraps the user's own task: whatever it raises becomes one line that names the method, the error and the
line of code.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt
from fopd_cli.tasks.base import Grade

OURS = Path(__file__).resolve().parent.parent


class Guarded:
    """Wraps a task, or an episode of one. Attributes that it lacks stay missing."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._inner, attribute)
        return _guarded(found, self._name, attribute) if callable(found) else found


def _guarded(method: Callable[..., Any], name: str, called: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        try:
            found = method(*args, **options)
        except Exception as error:
            raise blamed(error, name, f"{called}()") from error
        if inspect.isawaitable(found):
            return _awaited(found, name, called)
        if called == "episode":
            return Guarded(found, name)
        _check(found, name, called)
        return found

    return call


async def _awaited(waiting: Awaitable[Any], name: str, called: str) -> Any:
    try:
        return await waiting
    except Exception as error:
        raise blamed(error, name, f"{called}()") from error


def _check(found: Any, name: str, called: str) -> None:
    """The result must be of the type that base.py says."""
    if called == "grade" and not isinstance(found, Grade | numbers.Real):
        raise UserError(
            f"task.name: {name}: grade() returned {_of_kind(found)}; it must be a number in [0, 1] or a Grade"
        )
    if called == "prompts":
        if isinstance(found, str) or not hasattr(found, "__len__") or not hasattr(found, "__getitem__"):
            raise UserError(
                f"task.name: {name}: prompts() returned {_of_kind(found)}; it must be a list of Prompt"
            )
        for number, prompt in enumerate(found):
            if not isinstance(prompt, Prompt):
                raise UserError(
                    f"task.name: {name}: prompts()[{number}] is {_of_kind(prompt)}; it must be a Prompt"
                )
            if prompt.index != number:
                raise UserError(
                    f"task.name: {name}: prompts()[{number}] has the index {prompt.index}; it must be its "
                    f"position, {number}"
                )


def _of_kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def blamed(error: Exception, name: str, what: str) -> UserError:
    """The error as a `UserError`, with the last line of the user's code that it came through."""
    if isinstance(error, UserError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        f for f in frames if OURS not in Path(f.filename).resolve().parents and "importlib" not in f.filename
    ]
    own = [f for f in theirs if "site-packages" not in f.filename and "lib/python" not in f.filename]
    at = next(reversed(own or theirs), None)
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    else:
        where = "" if at is None else f" ({at.filename}, line {at.lineno})"
    return UserError(f"task.name: {name}: {what} raised {type(error).__name__}: {error}{where}")
