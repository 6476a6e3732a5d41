"""Work in a thread beside the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """What `do` returns; it begins at once."""

    def __init__(self, do: Callable[[], T]) -> None:
        self._do = do
        self._found: list[T] = []
        self._error: BaseException | None = None
        # A daemon: a second Ctrl-C waits for nothing, and what is half done has no final name.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._do())
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over, with or without success."""
        self._thread.join()

    def result(self) -> T:
        """Wait for it; raises what it raised, `OSError` if the disk is full."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
