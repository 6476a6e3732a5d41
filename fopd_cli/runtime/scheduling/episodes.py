"""Episodes between the sampler and the environment: whose turn it is, and their tokens, which are only ever
appended.

    request ──> sampler ──turn──> environment ──observation──> next request ... ──> one Rollout of all turns

Token in, token out: what was sampled is never rendered or tokenized again. An observation is encoded by
itself, as what a chat template puts between two turns of the assistant, so a template that drops earlier
reasoning changes nothing. Its tokens carry no loss. All turns and observations together stay within the
sampler's `max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fopd_cli.samples import PER_TOKEN, Request, Rollout, seed_of


@dataclass
class Running:
    """One episode. `number` tells it from an earlier one of the same sample that was given up."""

    first: Request
    replica: int
    number: int
    turns: list[Rollout] = field(default_factory=list)
    observations: list[np.ndarray] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    answer: str | None = None

    @property
    def spent(self) -> int:
        """Response tokens so far."""
        return sum(t.response_length for t in self.turns) + sum(map(len, self.observations))


class Episodes:
    """All running episodes of a run."""

    def __init__(self) -> None:
        self.running: dict[int, Running] = {}
        self._started = 0

    def start(self, request: Request, replica: int) -> None:
        """The sampler is given the first turn of an episode."""
        self._started += 1
        self.running[request.key] = Running(request, replica, self._started)

    def on_turn(self, turn: Rollout) -> Running | None:
        """The sampler wrote a turn; None if the episode was given up meanwhile."""
        episode = self.running.get(turn.key)
        if episode is not None:
            episode.turns.append(turn)
        return episode

    def on_observed(
        self,
        key: int,
        number: int,
        token_ids: np.ndarray | None,
        calls: list[dict[str, Any]],
        answer: str | None = None,
    ) -> Running | None:
        """The environment answered; no `token_ids`: the episode is over. Returns None if it was given up
        meanwhile.
        """
        episode = self.running.get(key)
        if episode is None or episode.number != number:
            return None
        episode.calls += calls
        episode.answer = answer
        if token_ids is not None:
            episode.observations.append(token_ids)
        return episode

    def next_turn(self, episode: Running) -> Request | None:
        """The sampler's next request; None if no token is left for it."""
        left = episode.first.params.max_new_tokens - episode.spent
        if left <= 0:
            return None
        tokens = [episode.first.token_ids]
        for turn, observation in zip(episode.turns, episode.observations, strict=True):
            tokens += [turn.response_ids, observation]
        return replace(
            episode.first,
            token_ids=np.concatenate(tokens).astype(np.int32),
            seed=seed_of(episode.first.seed, str(len(episode.turns))),
            params=replace(episode.first.params, max_new_tokens=left),
        )

    def finish(self, episode: Running) -> Rollout:
        """The whole episode as one sample; ends with a turn of the student."""
        del self.running[episode.first.key]
        return joined(episode)

    def drop(self, keys: Iterable[int]) -> list[int]:
        """Give up these episodes; returns the keys of those that were running."""
        return [key for key in list(keys) if self.running.pop(key, None) is not None]


def joined(episode: Running) -> Rollout:
    """Turns and the observations between them, end to end. Tokens that the student did not sample have no
    loss and log-prob nan.
    """
    turns, observations = episode.turns, episode.observations[: len(episode.turns) - 1]
    ids, spans, places = [episode.first.token_ids], [], []
    arrays: dict[str, list[np.ndarray]] = {
        name: [] for name in PER_TOKEN if getattr(turns[0], name) is not None
    }
    at = 0
    for number, turn in enumerate(turns):
        n = turn.response_length
        ids.append(turn.response_ids)
        spans += [(version, at + start, at + stop) for version, start, stop in turn.spans]
        places.append((at, at + n))
        for name, parts in arrays.items():
            parts.append(getattr(turn, name))
        at += n
        if number < len(observations):
            n = len(observations[number])
            ids.append(observations[number])
            spans.append((spans[-1][0], at, at + n))
            for name, parts in arrays.items():
                shape = (n, *parts[-1].shape[1:])
                parts.append(np.full(shape, PER_TOKEN[name].unsampled, dtype=parts[-1].dtype))
            at += n
    whole: dict[str, Any] = {name: np.concatenate(parts) for name, parts in arrays.items()}
    return Rollout(
        key=episode.first.key,
        token_ids=np.concatenate(ids).astype(np.int32),
        prompt_length=len(episode.first.token_ids),
        spans=_merged(spans),
        finish=turns[-1].finish,
        turns=places,
        calls=episode.calls,
        stale_kv=None if turns[0].stale_kv is None else sum(turn.stale_kv or 0 for turn in turns),
        answer=episode.answer,
        **whole,
    )


def _merged(spans: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Adjacent spans of one version, merged."""
    out: list[tuple[int, int, int]] = []
    for version, start, stop in spans:
        if out and out[-1][0] == version:
            out[-1] = (version, out[-1][1], stop)
        elif stop > start:
            out.append((version, start, stop))
    return out
