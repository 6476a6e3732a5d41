"""What a task is. A user's own task is any class with these methods, named in the recipe by import path.

Its module is beside the recipe, in the current folder, or among the installed packages. A prompt is
`Prompt(index, messages=[{"role": "user", "content": ...}])`, which goes through the student's chat template,
or `Prompt(index, text=...)`, which does not: the student reads it unchanged. Whatever the class raises is
reported with its line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fopd_cli.samples import Prompt


class Task(Protocol):
    """Built once in the conductor (for prompts) and once in the grader (for grades), from the same recipe
    keys.
    """

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """All prompts of a split, in a fixed order; `Prompt.index` is the position. The two splits are
        disjoint. Held-out prompts may name the set that they belong to (`Prompt.held_out`), all or none.
        """
        ...

    def grade(self, prompt: Prompt, response: str) -> float | Grade:
        """Score of one response in [0, 1]; must not raise on anything a model can write. For an episode, the
        response is its answer or its last turn.
        """
        ...


@dataclass(frozen=True)
class Grade:
    """A score in [0, 1], and further metrics, of which evaluations report the mean (a nan is left out)."""

    score: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """The environment's answer to a turn. `text` None: the episode is over, and `answer` is to be graded
    (None: the turn itself). Several texts are a message each, as the answers to parallel calls.

    `calls` describe what was executed: `tool`, `ok` (whether it ran to its end), `seconds`, `input`,
    `output`.
    """

    text: str | Sequence[str] | None
    role: Literal["user", "tool"] = "user"  # in the chat template
    calls: list[dict[str, Any]] = field(default_factory=list)
    answer: str | None = None


class Episode(Protocol):
    """One conversation with an environment; single use. Hundreds run in one process, so anything that waits
    must `await`.
    """

    async def observe(self, turn: str) -> Observation:
        """Execute what the student wrote (special tokens left out)."""
        ...

    async def close(self) -> None:
        """Leave nothing behind; called once, however the episode ended."""
        ...


class EpisodicTask(Task, Protocol):
    """A task whose prompts begin a conversation. It may have a `replay`, see `replay.py`."""

    def episode(self, prompt: Prompt, now: int) -> Episode:
        """A fresh environment, as it is when the student's version is `now`; real ones, with a time of their
        own, ignore that.
        """
        ...
