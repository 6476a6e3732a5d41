"""How a built-in task is made: from its section of the recipe, or from the section's keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError


def takes(name: str, section: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a constructor whose one argument is a section. A user's class that builds on a built-in task
    may give the keys of the section called `name` as keyword arguments; missing keys have the recipe's
    defaults.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def made(self: Any, options: BaseModel | None = None, **keys: Any) -> None:
            if options is None:
                try:
                    options = section.model_validate({"name": name, **keys})
                except ValidationError as error:
                    first = error.errors()[0]
                    key = ".".join(map(str, first["loc"]))
                    raise TypeError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
            init(self, options)

        return made

    return decorate
