"""What a task is. A user's own task is any class with these two methods, named in the recipe by import path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from fopd_cli.samples import Prompt


class Task(Protocol):
    """Built once in the conductor (for prompts) and once in the grader (for grades), from the same recipe keys."""

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order; `Prompt.index` is the position. Held-out means disjoint."""
        ...

    def grade(self, prompt: Prompt, response: str) -> float:
        """Score of one response in [0, 1]; must not raise on anything a model can write."""
        ...
