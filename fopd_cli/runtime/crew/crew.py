"""Who works for the conductor: engines that take commands and say what came of them.

    conductor ──send(engine, command)──> Crew ──receive()──> (engine, event) ──> conductor

The conductor does not know which crew it has: processes on this machine (`processes.py`), or engines in its
own process on a virtual clock (`inprocess.py`). Whoever dies, sleeps or is one of several ranks is the crew's
affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.scheduling.tickets import Role


@dataclass(frozen=True)
class Engine:
    """One sampler replica, one teacher with all its ranks, the learner with all of its, the grader, or the
    environment.
    """

    role: Literal["sampler", "teacher", "learner", "grader", "environment"]
    index: int = 0


LEARNER, GRADER, ENVIRONMENT = Engine("learner"), Engine("grader"), Engine("environment")


def sampler(replica: int) -> Engine:
    return Engine("sampler", replica)


def teacher(index: int) -> Engine:
    return Engine("teacher", index)


class Crew(Protocol):
    """Use as a context manager: leaving it sends everyone home, an exception at once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def start(self) -> None:
        """Returns when everyone stands; the learner has then published its version."""

    def send(self, engine: Engine, command: m.Command) -> None:
        """To an engine that is lost nothing is sent: `receive` says so. For an environment that is being
        started again commands wait.
        """

    def lease(self, sleeper: Role | None, waker: Role) -> None:
        """Where roles take turns on a device: put one to sleep, then wake the other. Answered by `Leased`."""

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        """What happened meanwhile, one by one; waits a moment if nothing did. Raises `WorkerError` if the
        learner is lost.
        """
        ...

    def end_programs(self) -> None:
        """Engines that started programs end them."""

    def memory(self) -> dict[str, int]:
        """Bytes of main memory that each worker holds for itself, as far as that is known."""
        ...

    def device_memory(self) -> dict[str, dict[str, int]]:
        """Bytes that each worker had allocated, and reserved, on its CUDA device at most."""
        ...
