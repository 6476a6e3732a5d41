"""What executing calls again costs: how many there were, and how long the learner waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterable


class Reexecutions:
    """Re-executions under way, and sums since the last optimizer step."""

    def __init__(self) -> None:
        self._under_way: set[int] = set()
        self._since: float | None = None  # when they began to hold up the learner, if they do
        self._clear()

    def _clear(self) -> None:
        self._done = self._changed = 0
        self._waited = self._executed = 0.0

    def begin(self, keys: Iterable[int], holding: bool) -> None:
        """The next optimizer step waits for these; `holding`: the learner is already free."""
        self._under_way |= set(keys)
        if holding and self._since is None:
            self._since = time.time()

    def hold(self) -> None:
        """The learner is free now."""
        self._since = time.time() if self._under_way else None

    def end(self, key: int, changed: bool, seconds: float) -> None:
        """One is done; its execution took `seconds`."""
        self._changed += changed
        self._done += 1
        self._executed += seconds
        self.forget(key)

    def forget(self, key: int) -> None:
        """One is done, or its sample is gone."""
        if key in self._under_way:
            self._under_way.discard(key)
            if not self._under_way and self._since is not None:
                self._waited += time.time() - self._since
                self._since = None

    def cost(self) -> dict[str, float]:
        """Since the last call: samples reexecuted, and those that changed; seconds of execution, and seconds
        that the learner waited.
        """
        found = {
            "replayed": float(self._done),
            "replayed_changed": float(self._changed),
            "replay_seconds": self._executed,
            "replay_wait_seconds": self._waited,
        }
        self._clear()
        return found
