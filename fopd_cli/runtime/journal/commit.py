"""The last part of a save, in a thread: hash what is not hashed yet, sync, rename, remove old checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fopd_cli.runtime.journal.checkpoint import CheckpointStore, write_synced


class Commit:
    """Completes the checkpoint in `folder` with its `state`, the text of state.json; begins at once. `known`:
    see `CheckpointStore.commit`.
    """

    def __init__(
        self, store: CheckpointStore, folder: Path, state: str, known: Mapping[str, dict[str, Any]]
    ) -> None:
        self._store, self._folder, self._state, self._known = store, folder, state, known
        self._error: BaseException | None = None
        # A daemon: a second Ctrl-C waits for nothing, and what is half done has no final name.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            write_synced(self._folder / "state.json", self._state)
            self._store.commit(self._folder, self._known)
        except BaseException as error:
            self._error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for it; raises what it raised, `OSError` if the disk is full."""
        self._thread.join()
        if self._error is not None:
            raise self._error
