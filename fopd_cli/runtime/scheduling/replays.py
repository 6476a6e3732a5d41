"""Replayed contexts between the environment and the teacher, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterable

from fopd_cli.runtime.crew import messages as m
from fopd_cli.samples import Context


class Replays:
    """`contexts` holds the current context of each sample whose context changed, until the sample is done
    with.
    """

    def __init__(self) -> None:
        self.contexts: dict[int, Context] = {}
        self._under_way: set[int] = set()
        self._since: float | None = None  # when they began to hold the learner, if they do
        self._clear()

    def _clear(self) -> None:
        self._replayed = self._changed = 0
        self._waited = self._executed = 0.0

    def begin(self, keys: Iterable[int], holding: bool) -> None:
        """The next optimizer step waits for these; `holding`: the learner is free for it already."""
        self._under_way |= set(keys)
        if holding and self._since is None:
            self._since = time.time()

    def hold(self) -> None:
        """The learner is free now."""
        self._since = time.time() if self._under_way else None

    def end(self, message: m.Replayed) -> None:
        """One of them is known."""
        if message.context is not None:
            self.contexts[message.key] = message.context
            self._changed += 1
        self._replayed += 1
        self._executed += message.span.end - message.span.start
        self._done(message.key)

    def forget(self, key: int) -> None:
        """Its sample is gone."""
        self.contexts.pop(key, None)
        self._done(key)

    def _done(self, key: int) -> None:
        if key in self._under_way:
            self._under_way.discard(key)
            if not self._under_way and self._since is not None:
                self._waited += time.time() - self._since
                self._since = None

    def cost(self) -> dict[str, float]:
        """Since the last call: samples replayed, of them changed; seconds of execution, and those in which
        the learner was free.
        """
        found = {
            "replayed": float(self._replayed),
            "replayed_changed": float(self._changed),
            "replay_seconds": self._executed,
            "replay_wait_seconds": self._waited,
        }
        self._clear()
        return found
