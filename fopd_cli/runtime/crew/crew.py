"""The engines that work for the conductor: they take commands and report results.

    conductor ──send(engine, command)──> Crew ──receive()──> (engine, event) ──> conductor

The conductor does not know which crew it has: worker processes on this machine (`processes.py`), or engines
in its own process on a virtual clock (`inprocess.py`). Deaths, sleep and multiple ranks are the crew's
business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from fopd_cli.names import EngineRole
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.scheduling.tickets import Role


@dataclass(frozen=True)
class Engine:
    """One sampler replica, one teacher with all its ranks, the learner with all its ranks, the grader, or the
    environment.
    """

    role: EngineRole
    index: int = 0

    @classmethod
    def of(cls, spec: WorkerSpec) -> Self:
        """The engine that a process belongs to."""
        match spec.role:
            case "sampler":
                return cls("sampler", spec.rank)
            case "teacher":
                return cls("teacher", spec.index)
            case "learner" | "grader" | "environment" as role:
                return cls(role)
            case _:
                raise ValueError(f"{spec.name} does not work for a run")


LEARNER, GRADER, ENVIRONMENT = Engine("learner"), Engine("grader"), Engine("environment")


def sampler(replica: int) -> Engine:
    return Engine("sampler", replica)


def teacher(index: int) -> Engine:
    return Engine("teacher", index)


class Crew(Protocol):
    """Use as a context manager: leaving it stops all engines, at once after an exception."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def start(self) -> None:
        """Returns when all engines are ready; the learner has then published its version."""

    def send(self, engine: Engine, command: m.Command) -> None:
        """Nothing is sent to a lost engine: `receive` reports the loss. Commands to an environment that is
        being restarted wait.
        """

    def lease(self, sleeper: Role | None, waker: Role) -> None:
        """Where roles take turns on a device: put one to sleep and wake the other, at once if the plan says
        so. Answered by `Leased` when both are done.
        """

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        """Events since the last call, one by one; waits a moment if there are none. Raises `WorkerError` if
        the learner is lost.
        """
        ...

    def end_programs(self) -> None:
        """Have engines end the programs that they started."""

    def memory(self) -> dict[str, int]:
        """Bytes of main memory that each worker holds for itself, where known."""
        ...

    def device_memory(self) -> dict[str, dict[str, int]]:
        """Peak bytes that each worker's own process allocated and reserved on its CUDA devices."""
        ...
