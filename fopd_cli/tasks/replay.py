"""What a stored conversation would look like today: the current context c_ih, on which supervision drift is
measured.

The student's turns are given; what the environment says between them may have changed. A task whose world can
be looked up more cheaply than by repeating everything (retrieval, memory) defines

    async def replay(self, prompt: Prompt, turns: list[str], now: int) -> Replay

A task without turns may define it, too, to say how its prompt has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fopd_cli.samples import Context, Prompt, Rollout
from fopd_cli.tasks.base import Observation


@dataclass(frozen=True)
class Replay:
    """The question as it would be asked today, and the environment's answers to each turn but the last.

    If there are fewer answers, the environment ended the conversation early, and later turns have no context.
    """

    prompt: Prompt
    observations: Sequence[Observation]


async def replay(task: Any, prompt: Prompt, turns: Sequence[str], now: int) -> Replay:
    """By the task's own method, else by executing the turns again in a fresh environment."""
    if (own := getattr(task, "replay", None)) is not None:
        found: Replay = await own(prompt, list(turns), now)
        return found
    episode, seen = task.episode(prompt, now), []
    try:
        for turn in turns[:-1]:
            observation: Observation = await episode.observe(turn)
            if observation.text is None:
                break
            seen.append(observation)
    finally:
        await episode.close()
    return Replay(prompt, seen)


def realigned(rollout: Rollout, prompt_ids: np.ndarray, observations: Sequence[np.ndarray]) -> Context:
    """The current context: the student's own tokens, between today's prompt and today's observations.

    It holds every sampled token once, up to and including the first turn without an observation.
    """
    pieces, length = [prompt_ids], len(prompt_ids)
    positions = np.full(rollout.response_length, -1, dtype=np.int64)
    turns = rollout.turns or [(0, rollout.response_length)]
    for number, (start, stop) in enumerate(turns[: len(observations) + 1]):
        positions[start:stop] = np.arange(length, length + stop - start)
        pieces.append(rollout.response_ids[start:stop])
        length += stop - start
        if number < len(observations):
            pieces.append(observations[number])
            length += len(observations[number])
    return Context(np.concatenate(pieces).astype(np.int32), positions)


def judged_context(rollout: Rollout, told: np.ndarray | None) -> Context:
    """The context on which it was first judged; `told` is the prompt as the teacher saw it, if that differs
    from the student's.
    """
    if told is None:
        return rollout.judged
    ids = np.concatenate([told, rollout.response_ids]).astype(np.int32)
    return Context(ids, np.arange(len(told), len(ids)))


def same(a: Context, b: Context) -> bool:
    """Whether the teacher would read the same."""
    return np.array_equal(a.token_ids, b.token_ids)
