"""Built-in tasks by their name and keys, as a recipe would have them."""

from __future__ import annotations

from typing import Any

from fopd_cli.tasks import load_task


def built(name: str, **keys: Any) -> Any:
    """The task's object, whose own methods tests look at."""
    return load_task(name, keys)
