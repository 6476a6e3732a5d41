"""Ctrl-C, SIGTERM, a closed terminal: the first asks the run to end with a checkpoint, the next one ends it
at once.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Any

from fopd_cli.errors import Interrupted
from fopd_cli.runtime.crew.warm import STOPPING

# `timeout` sends its signal to the command and then to the whole group: one that comes this soon after the
# first is the same.
SAME_SIGNAL_S = 0.3


class Signals:
    """Inside its `with` block, `received` tells whether a signal came. If never entered, it receives none."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def received(self) -> bool:
        return self._last is not None

    def __enter__(self) -> Signals:
        # Under nohup, a closing terminal is none of our business.
        ours = [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
        self._handlers = {s: signal.signal(s, self._on_signal) for s in ours}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            # On the way out after a Ctrl-C, another one must not spoil a clean end.
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        now, last = time.monotonic(), self._last
        if last is not None and now - last < SAME_SIGNAL_S:
            return
        self._last = now
        if last is not None:
            raise Interrupted("stopped immediately; the last checkpoint is intact")
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line
            self._say(
                "stopping: finishing this optimizer step and writing a checkpoint (a second signal stops now)"
            )
