"""Workers that start with torch and transformers already imported, unless a GPU forbids it.

A worker on a CPU spends most of its first seconds on imports, and there are three or four workers. One
process imports once, in parallel with the command's own imports, and the workers are forked from it
(multiprocessing's fork server). Where there is a GPU driver, every worker is a fresh Python: a process that
may have touched a driver must not be forked. With an empty `CUDA_VISIBLE_DEVICES` none touches it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # CUDA's, CUDA's under WSL, ROCm's

_begun = False


def begin() -> None:
    """Start importing, in a separate process. For commands that start workers unless they are refused."""
    global _begun
    if not may_fork():
        return
    _begun = True
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fopd_cli.runtime.crew.preload"])
    track()
    with signals_blocked():
        forkserver.ensure_running()


def may_fork() -> bool:
    """Whether workers can be forked from a process that has imported torch."""
    driver = any(map(os.path.exists, DRIVERS)) and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return sys.platform == "linux" and not driver


def track() -> None:
    """Start Python's semaphore tracker beforehand: starting it unblocks SIGINT and SIGTERM, and a SIGHUP
    would kill it.
    """
    with signals_blocked():
        resource_tracker.ensure_running()


def context() -> BaseContext:
    """How processes are started: forked if `begin` was called and could do so, else spawned."""
    return multiprocessing.get_context("forkserver" if _begun else "spawn")


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """A process started meanwhile begins with these signals blocked: it imports for seconds before it can
    handle them. This process gets them a moment later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
