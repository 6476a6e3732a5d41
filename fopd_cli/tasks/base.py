"""What a task is. A user's own task is any class with these methods, named in the recipe by import path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fopd_cli.samples import Prompt


class Task(Protocol):
    """Built once in the conductor (for prompts) and once in the grader (for grades), from the same recipe keys."""

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order; `Prompt.index` is the position. Held-out means disjoint."""
        ...

    def grade(self, prompt: Prompt, response: str) -> float:
        """Score of one response in [0, 1]; must not raise on anything a model can write. Of an episode: of its last turn."""
        ...


@dataclass(frozen=True)
class Observation:
    """What the environment answers to a turn. `text` None: the episode is over.

    `calls` describe what was executed: `tool`, `ok` (it could be run to its end), `seconds`, `input`, `output`.
    """

    text: str | None
    role: Literal["user", "tool"] = "user"  # under which a chat template shows it
    calls: list[dict[str, Any]] = field(default_factory=list)


class Episode(Protocol):
    """One conversation with an environment; single use. Hundreds run in one process, so whatever waits must `await`."""

    async def observe(self, turn: str) -> Observation:
        """Execute what the student wrote (special tokens left out)."""
        ...

    async def close(self) -> None:
        """Leave nothing behind; comes once, whatever became of the episode."""
        ...


class EpisodicTask(Task, Protocol):
    """A task whose prompts begin a conversation."""

    def episode(self, prompt: Prompt) -> Episode:
        """A fresh environment."""
        ...
