"""A process group for weights: rank 0 broadcasts. NCCL between CUDA devices, gloo on a CPU.

It is no part of torch's default groups, which learner ranks and vLLM's processes have among themselves. A
member that dies ends it for the others: they watch each other's connections while an operation is under way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOK_S = 0.0005  # between two looks at an operation


class Gone(Exception):
    """Another member died, or did nothing for too long."""


class Group:
    """`path` is a fresh file's, where the members meet. Making one waits for all of them. `others` are
    the connections to watch.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        world: int,
        device: torch.device,
        others: Sequence[Connection],
        timeout_s: float,
    ) -> None:
        self._others, self._timeout_s = list(others), timeout_s
        store = dist.FileStore(str(path), world)
        limit = timedelta(seconds=timeout_s)
        self._group: Any = (
            _nccl(store, rank, world, limit) if device.type == "cuda" else _gloo(store, rank, world, limit)
        )

    def broadcast(self, tensor: Tensor) -> Any:
        """Begin to send it (rank 0) or to receive into it; returns what `finish` takes."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._group.broadcast([tensor], options)

    def finish(self, work: Any) -> None:
        """Wait for an operation. Raises `Gone`; the group is then of no use any more."""
        deadline = time.monotonic() + self._timeout_s
        while not work.is_completed():
            time.sleep(LOOK_S)
            if any(map(_closed, self._others)):
                raise Gone("a process at the other end is gone")
            if time.monotonic() > deadline:
                raise Gone(f"nothing has moved for {self._timeout_s:.0f} s")
        try:
            work.wait()
        except RuntimeError as error:  # gloo's, for a connection that broke
            raise Gone(str(error).splitlines()[0]) from None

    def close(self) -> None:
        """End whatever is under way (a kernel of NCCL would wait for its peer for good), and the group's
        threads: where they outlive the interpreter, they abort the process.
        """
        if self._group is not None:
            self._group.abort()
            self._group = None


def _closed(connection: Connection) -> bool:
    """Whether the process at the other end has closed it, or died. What it has sent is left alone."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as end:
            return end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def hang_up(connection: Connection) -> None:
    """End a connection from any thread: one that waits at either end hears of it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _gloo(store: Any, rank: int, world: int, limit: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = limit
    return gloo(store, rank, world, options)


def _nccl(store: Any, rank: int, world: int, limit: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * limit  # ours comes first
    with _errors_left_to_us():
        return dist.ProcessGroupNCCL(store, rank, world, options)


@contextlib.contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """A group made meanwhile does not end its process when an operation fails or takes too long: the death of
    a sampler must not be the learner's.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
