"""Publishes a learner's weights while its next step computes.

    compute   step t | update | forward and backward of t + 1 ......... | update | ...
    publisher                 | read, cast, copy to the slot | stamp, report
                                                             `--> the update waits for the last read

Nothing is copied twice: weights are read where they are, and whatever would change or move them waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fopd_cli.engines.protocols import Piece, Publishing
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.fleet import failure
from fopd_cli.runtime.memory.weights import SharedWeights
from fopd_cli.runtime.weights.transport import Outlet

AT_ONCE = 1 << 24  # elements that are cast together: beside a step there is little memory left


class Publisher:
    """One rank's. `post` is given `Published`, or `Failed`, from any thread.

    On a device it reads and copies on a stream of its own, once what was computed before is done.
    """

    def __init__(self, weights: Outlet, cuda: bool, post: Callable[[m.Published | m.Failed], None]) -> None:
        self._weights, self._post = weights, post
        self._stream = torch.cuda.Stream() if cuda else None
        self._thread: threading.Thread | None = None
        self._queued = threading.Event()  # all reads are done, or in the stream
        self._read: Any = None  # the event behind the last of them, on a device

    def publish(self, engine: Publishing) -> None:
        """Begin to publish the learner's version. Returns at once, or when it is done if that takes whole
        weights.
        """
        self.finish()
        pieces, version = engine.pieces() if self._weights.pieces else None, engine.version
        if pieces is None:
            start = time.time()
            written = self._weights.write(version, engine.publish(self._weights.dtypes))
            self._report(version, start, written)
            return
        self._queued.clear()
        self._read = None
        computed = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._thread = threading.Thread(
            target=self._publish_or_fail, args=(version, pieces, computed), name="publish", daemon=True
        )
        self._thread.start()

    def let_update(self) -> None:
        """Call before weights change: what this thread does from now on, and what it queues on the device,
        comes after the last read.
        """
        if self._thread is not None:
            self._queued.wait()
            if self._read is not None:
                torch.cuda.current_stream().wait_event(self._read)

    def finish(self) -> None:
        """Returns when the publication under way is reported: before the weights move, and before the next
        version is spoken of.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _publish_or_fail(self, version: int, pieces: Sequence[Piece], computed: Any) -> None:
        try:
            if computed is not None:
                computed.synchronize()
            start = time.time()
            with self._beside(), self._weights.writing(version) as slot:
                written = self._copy(slot, pieces)
                self._queued.set()
                if self._read is not None:
                    self._read.synchronize()
            self._report(version, start, written)
        except BaseException as error:
            self._post(failure(error))
        finally:
            self._queued.set()

    @torch.no_grad()
    def _copy(self, slot: SharedWeights, pieces: Sequence[Piece]) -> int:
        """Cast and copy; on a device the copies are queued. Returns bytes written."""
        views, written = {name: view.view(-1) for name, view in slot}, 0
        for piece in pieces:
            elements, view = piece.read().reshape(-1), views.pop(piece.name)
            for begin in range(0, len(elements), AT_ONCE):
                part = elements[begin : begin + AT_ONCE]
                place = view[piece.start + begin : piece.start + begin + len(part)]
                place.copy_(part.to(place.dtype) if part.is_cuda else part, non_blocking=True)
                written += place.nbytes
        if self._stream is not None:
            self._read = self._stream.record_event()
        if views:
            raise RuntimeError(f"the learner does not publish {sorted(views)[:3]}")
        return written

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _report(self, version: int, start: float, written: int) -> None:
        span = m.Span("publish", start, time.time(), {"version": version})
        self._post(m.Published(version, written, span))
