"""Whose turn it is: what a sampler wrote goes to the environment, and the answer goes back to the sampler.

    turn ──on_turns──> environment ──on_observed──> the next request, or the whole episode as one rollout

`fopd run` and `fopd eval` both keep their episodes here; they differ in what samples and what executes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fopd_cli.engines.models import hf
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.scheduling.episodes import Episodes, Running
from fopd_cli.samples import Prompt, Request, Rollout

Finished = list[tuple[int, Rollout]]  # sampler replica, whole episode


class Conversations:
    """All running episodes. `asked(key)` is the prompt, and the student's version when it was asked;
    `sample(replica, requests)` and `execute(command)` pass on what is next.

    `together`: a sampler gets its next turns only when all its episodes are back, so that two runs form the
    same batches; else each turn goes back at once.
    """

    def __init__(
        self,
        tokenizer: Any,
        asked: Callable[[int], tuple[Prompt, int]],
        sample: Callable[[int, list[Request]], None],
        execute: Callable[[m.EnvironmentCommand], None],
        together: bool,
    ) -> None:
        self._tokenizer, self._asked = tokenizer, asked
        self._sample, self._execute, self._together = sample, execute, together
        self._episodes = Episodes()
        self._held: dict[int, Request] = {}  # next turns that wait for the others of their group

    def __bool__(self) -> bool:
        """Whether any is running."""
        return bool(self._episodes.running)

    def start(self, replica: int, requests: list[Request]) -> None:
        """The first turns of these episodes."""
        for request in requests:
            self._episodes.start(request, replica)
        self._sample(replica, requests)

    def on_turns(self, replica: int, turns: Iterable[Rollout]) -> Finished:
        """A sampler wrote these turns. Returns the episodes that they ended, for want of tokens."""
        finished = []
        for turn in turns:
            episode = self._episodes.on_turn(turn)
            if episode is None:  # it was given up meanwhile
                continue
            if turn.finish == "length":
                finished.append(self._cut_off(episode))
            else:
                self._execute(self._turn(episode, turn))
        self._go_on(replica)
        return finished

    def _turn(self, episode: Running, turn: Rollout) -> m.TurnCommand:
        prompt, now = self._asked(turn.key)
        text = hf.decode_turn(self._tokenizer, turn.response_ids)
        return m.TurnCommand(turn.key, episode.number, prompt, text, now, int(turn.response_ids[-1]))

    def on_observed(self, seen: m.Observed) -> Finished:
        """The environment answered. Returns the episode if it is over."""
        episode = self._episodes.on_observed(seen.key, seen.episode, seen.token_ids, seen.calls, seen.answer)
        if episode is None:  # it was given up meanwhile
            return []
        finished = []
        if seen.token_ids is None:
            finished.append((episode.replica, self._episodes.finish(episode)))
        elif (request := self._episodes.next_turn(episode)) is not None:
            self._held[seen.key] = request
        else:  # no token is left to answer with
            finished.append(self._cut_off(episode))
        self._go_on(episode.replica)
        return finished

    def _cut_off(self, episode: Running) -> tuple[int, Rollout]:
        self._execute(m.CancelCommand([episode.first.key]))
        return episode.replica, self._episodes.finish(episode)

    def _go_on(self, replica: int) -> None:
        """Give a sampler the turns that it can continue."""
        running = {key: e for key, e in self._episodes.running.items() if e.replica == replica}
        ready = sorted(running.keys() & self._held.keys())
        if not ready or (self._together and len(ready) < len(running)):
            return
        self._sample(replica, [self._held.pop(key) for key in ready])

    def give_up(self, replica: int) -> None:
        """A sampler was stopped: its episodes start over, or were dropped."""
        lost = self._episodes.drop([k for k, e in self._episodes.running.items() if e.replica == replica])
        for key in lost:
            self._held.pop(key, None)
        self._execute(m.CancelCommand(lost))
