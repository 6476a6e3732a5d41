"""One sandbox with one process tree in it, watched from outside: time, memory, output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Literal

from fopd_cli.sandbox import bubblewrap
from fopd_cli.sandbox.limits import Limits, Outcome

WATCH_S = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")
SURVEY_S = 1.0  # how often a workspace's files are counted
Reason = Literal["exit", "timeout", "memory", "disk", "output", "died"]


class Jail:
    """A running sandbox. `kill` ends every process in it, daemons included: their namespace ends."""

    def __init__(
        self, process: asyncio.subprocess.Process, limits: Limits, workspace: Path | None = None
    ) -> None:
        self.process, self.limits, self.workspace = process, limits, workspace
        self._buffer = b""

    @classmethod
    async def start(
        cls, command: list[str], limits: Limits, workspace: Path | None = None, sandboxed: bool = True
    ) -> Jail:
        make = bubblewrap.invocation if sandboxed else bubblewrap.unprotected
        one = make(command, limits, workspace)
        process = await asyncio.create_subprocess_exec(
            *one.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            **one.options,
        )
        return cls(process, limits, workspace)

    async def send(self, data: bytes) -> None:
        """Write to its standard input; what it has not read when it dies is lost."""
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(data)
            await self.process.stdin.drain()

    async def read(self, until: bytes | None) -> tuple[bytes, bytes, Reason]:
        """(output before the marker, rest of the marker's line, why it ended); without `until`, all up to the
        end.

        When the first limit is exceeded, everything in the sandbox is killed.
        """
        reading = asyncio.ensure_future(self._read(until))
        watching = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait(
                {reading, watching}, timeout=self.limits.wall_s, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                output, line, reason = reading.result()
            else:
                output, line = self._buffer, b""
                reason = watching.result() if watching.done() else "timeout"
        finally:
            reading.cancel()
            watching.cancel()
            await asyncio.gather(reading, watching, return_exceptions=True)
        if reason != "exit":
            await self.kill()
        return output[: self.limits.output_kb << 10], line, reason

    async def kill(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own
        self.process.stdin.close()
        while await self.process.stdout.read(1 << 16):
            pass  # asyncio does not see the end of a process whose output is not read
        await self.process.wait()

    async def _read(self, until: bytes | None) -> tuple[bytes, bytes, Reason]:
        assert self.process.stdout is not None
        self._buffer = b""
        while True:
            if until is not None and (found := self._buffer.find(until)) >= 0:
                end = self._buffer.find(b"\n", found + len(until))
                if end >= 0:
                    return self._buffer[:found], self._buffer[found + len(until) : end], "exit"
            if len(self._buffer) > self.limits.output_kb << 10:
                return self._buffer, b"", "output"
            chunk = await self.process.stdout.read(1 << 16)
            if not chunk:
                return self._buffer, b"", "exit" if until is None else "died"
            self._buffer += chunk

    async def _watch(self) -> Reason:
        """Returns when all processes together hold more memory than they may, or the workspace more files."""
        surveyed = time.monotonic()
        while not holds_more(self.process.pid, self.limits.memory_mb << 20):
            if self.workspace is not None and time.monotonic() - surveyed > SURVEY_S:
                if await asyncio.to_thread(occupied, self.workspace) > self.limits.workspace_mb << 20:
                    return "disk"
                surveyed = time.monotonic()
            await asyncio.sleep(WATCH_S)
        return "memory"


def holds_more(pid: int, limit: int) -> bool:
    """Whether a process and all its descendants together hold more than `limit` bytes of memory.

    The cheap sum counts pages that forks share in each of them; the exact one is taken only if that is over.
    """
    family = processes(pid)
    return sum(map(resident, family)) > limit and sum(map(proportional, family)) > limit


def processes(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    with contextlib.suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += processes(int(child))
    return found


def resident(pid: int) -> int:
    """Bytes of memory that a process can see; 0 once it has ended."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


def proportional(pid: int) -> int:
    """Bytes of memory of a process, with only its part of what it shares; like `resident` if the kernel does
    not say.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return resident(pid)


def occupied(folder: Path) -> int:
    """Bytes on disk of all files under a folder."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


async def run(
    command: list[str], limits: Limits, workspace: Path | None = None, sandboxed: bool = True
) -> Outcome:
    """Run one command from start to end, and leave nothing of it behind."""
    began = time.monotonic()
    jail = await Jail.start(command, limits, workspace, sandboxed)
    assert jail.process.stdin is not None
    jail.process.stdin.close()  # a command that reads from it must not wait forever
    try:
        output, _, reason = await jail.read(None)
        code = await asyncio.wait_for(jail.process.wait(), 5) if reason == "exit" else None
    finally:
        await jail.kill()
    return Outcome(output.decode(errors="replace"), reason, code, time.monotonic() - began)
