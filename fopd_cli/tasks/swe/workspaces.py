"""Where an instance's repository lives while an agent works on it or its tests run: a sandbox here, or a
container.

Commands block their thread (each episode has one); `stop` ends a running one from another thread.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from fopd_cli.errors import UserError
from fopd_cli.sandbox import bubblewrap
from fopd_cli.sandbox.limits import Limits, Outcome
from fopd_cli.sandbox.process import run
from fopd_cli.tasks.swe.instances import Instance

GIT = (
    "git",
    "-c",
    "user.name=fopd",
    "-c",
    "user.email=fopd@localhost",
    "-c",
    "commit.gpgsign=false",
    "-c",
    "core.hooksPath=/dev/null",
)
MOST_READ = 50_000_000  # characters of a file
STEP = 64_000  # characters of base64 per command: Linux limits a single argument to 128 kB
NOTES = {
    "timeout": "stopped: it took longer than {0.wall_s:g} s",
    "memory": "stopped: it used more than {0.memory_mb} MB",
    "output": "stopped: it printed more than {0.output_kb} kB",
    "disk": "stopped: it wrote more than {0.workspace_mb} MB",
    "died": "stopped",
}


class Workspace(Protocol):
    """A repository at its base commit; single use."""

    directory: str  # its path as seen from inside

    def run(self, command: str, wall_s: float | None = None) -> Outcome:
        """One bash command in the repository. Only files outlive it."""
        ...

    def read(self, name: str) -> str | None:
        """A file of the repository as text; None if it is missing or not a plain file."""
        ...

    def stop(self) -> None:
        """End the running command, if there is one."""
        ...

    def close(self) -> None: ...


class LocalWorkspace:
    """A bubblewrap sandbox with the repository on disk at /workspace. `slots` bounds the commands that run at
    once.
    """

    def __init__(
        self, instance: Instance, limits: Limits, slots: threading.Semaphore, sandboxed: bool = True
    ) -> None:
        self.limits, self.slots, self.sandboxed = limits, slots, sandboxed
        self.path = Path(tempfile.mkdtemp(prefix="fopd-swe-"))
        self.directory = "/workspace" if sandboxed else str(self.path)
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Outcome]] | None = None
        self._stopped = False
        try:
            _check_out(instance, self.path)
            if sandboxed:
                bubblewrap.own(self.path)
        except BaseException:
            self.close()
            raise

    def run(self, command: str, wall_s: float | None = None) -> Outcome:
        with self.slots:
            return asyncio.run(self._run(command, wall_s or self.limits.wall_s))

    async def _run(self, command: str, wall_s: float) -> Outcome:
        task = asyncio.ensure_future(
            run(["bash", "-c", command], replace(self.limits, wall_s=wall_s), self.path, self.sandboxed)
        )
        self._running = (asyncio.get_running_loop(), task)
        if self._stopped:  # by a call that found nothing running yet
            task.cancel()
        try:
            return await task
        finally:
            self._running = None

    def read(self, name: str) -> str | None:
        try:
            fd = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        with open(fd, encoding="utf-8", errors="replace") as file:
            return file.read(MOST_READ) if stat.S_ISREG(os.fstat(fd).st_mode) else None

    def stop(self) -> None:
        """For good: what runs ends at once, and nothing runs after it."""
        self._stopped = True
        if (running := self._running) is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just ended
                running[0].call_soon_threadsafe(running[1].cancel)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _check_out(instance: Instance, path: Path) -> None:
    """The instance's files in a fresh git repository."""
    if instance.files is None and instance.directory is None:
        raise UserError(
            f"task: instance {instance.id} has no files and no directory; it needs its container: set "
            "task.sandbox: docker or podman"
        )
    if instance.directory is not None:
        shutil.copytree(instance.directory, path, dirs_exist_ok=True, symlinks=True)
    for name, text in (instance.files or {}).items():
        target = (path / name).resolve()
        if not target.is_relative_to(path.resolve()):
            raise UserError(
                f"task: instance {instance.id} names the file {name!r}, which is outside of its repository"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    if (path / ".git").exists():
        return
    commands = [
        ("init", "-q", "--template="),
        ("add", "-A", "-f"),
        ("commit", "-q", "--allow-empty", "-m", "base"),
    ]
    script = " && ".join(shlex.join([*GIT, *command]) for command in commands)
    done = subprocess.run(["sh", "-c", script], cwd=path, capture_output=True, text=True)
    if done.returncode == 127:
        raise UserError("task: git is not installed; the swe task needs it")
    if done.returncode:
        raise UserError(f"task: instance {instance.id}: git failed: {done.stderr.strip()[-200:]}")


class ContainerWorkspace:
    """A container of the instance's image without network or capabilities, run by mini-SWE-agent's own Docker
    environment.

    `executable` is docker or podman. Not yet run: none of our machines has either.
    """

    directory = "/testbed"

    def __init__(self, instance: Instance, limits: Limits, executable: str) -> None:
        from minisweagent.environments.docker import DockerEnvironment

        if instance.image is None:
            raise UserError(f"task: instance {instance.id} names no container image")
        self.limits, self._name = limits, f"fopd-swe-{uuid.uuid4().hex[:12]}"
        arguments = [
            "--rm",
            "--network",
            "none",
            "--cap-drop",
            "ALL",
            "--security-opt",
            "no-new-privileges",
            "--memory",
            f"{limits.memory_mb}m",
            "--pids-limit",
            str(limits.processes),
            "--label",
            self._name,
        ]
        try:
            self._environment = DockerEnvironment(
                image=instance.image,
                cwd=self.directory,
                executable=executable,
                run_args=arguments,
                interpreter=["bash", "-c"],
                env={"BASH_ENV": "/root/.bashrc", "PAGER": "cat"},
                timeout=int(limits.wall_s),
                pull_timeout=1800,
            )
        except FileNotFoundError:
            raise UserError(f"task.sandbox: {executable} is not installed") from None
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", None) or error).strip()
            raise UserError(f"task: {executable} cannot start {instance.image}: {said[-300:]}") from None

    def run(self, command: str, wall_s: float | None = None) -> Outcome:
        from minisweagent.exceptions import Submitted

        began = time.monotonic()
        try:
            found = self._environment.execute({"command": command}, timeout=int(wall_s or self.limits.wall_s))
        except Submitted as submitted:  # it looks for the magic line itself; so does our caller
            extra = submitted.messages[0]["extra"]
            found = {
                "output": f"COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT\n{extra['submission']}",
                "returncode": 0,
            }
        seconds = time.monotonic() - began
        if found["returncode"] == -1:
            return Outcome(found["output"], "timeout", None, seconds)
        return Outcome(found["output"], "exit", found["returncode"], seconds)

    def read(self, name: str) -> str | None:
        found = self.run(f"cat {shlex.quote(name)}")
        return found.output if found.code == 0 else None

    def stop(self) -> None:
        self.close()

    def close(self) -> None:
        self._environment.cleanup()


def write(workspace: Workspace, path: str, text: str) -> None:
    """Put a file into a repository, whatever its content. `path` must be safe in a shell."""
    data = base64.b64encode(text.encode(errors="replace")).decode()
    for i in range(0, max(1, len(data)), STEP):
        workspace.run(f"printf %s '{data[i : i + STEP]}' | base64 -d {'>>' if i else '>'} {path}")


def shown(outcome: Outcome, limits: Limits) -> str:
    """A command's output, and the reason if it was stopped."""
    if outcome.reason == "exit":
        return outcome.output
    return f"{outcome.output.rstrip()}\n{NOTES[outcome.reason].format(limits)}\n".lstrip("\n")
