"""Worker processes: spawned, watched, stopped. Nothing here knows what the workers compute.

Each worker has its own inbox and outbox, each with one writer and one reader, so a worker killed in
mid-message can corrupt only its own queue. The conductor waits on all outboxes and all process sentinels at
once.

Only the conductor handles signals: `timeout`, systemd and a terminal send them to every process, and a worker
that obeyed would end the running step. Workers start with them blocked, and ignore them from then on.

No worker outlives the command: the kernel kills it when its parent dies (PR_SET_PDEATHSIG), whatever killed
the parent; where workers are forked from a server (`warm.py`), the server is tied to the command in the same
way. No worker hangs unnoticed: it bumps its pulse as it works. One that owes an answer and has had no pulse
for `timeout_s` (`start_timeout_s` while it loads its model) has its stacks written to its log, and is killed
and reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fopd_cli.errors import UserError, WorkerError
from fopd_cli.names import WorkerRole
from fopd_cli.runtime import devices
from fopd_cli.runtime.crew import cores, out_of_memory, warm
from fopd_cli.runtime.crew.cores import Cores
from fopd_cli.runtime.crew.messages import Failed, Lost, StopCommand
from fopd_cli.runtime.crew.warm import PR_SET_PDEATHSIG, STOPPING

STOP_TIMEOUT_S = 10.0
REFUSAL_WAIT_S = 15.0  # for other refusals, once one worker has refused to start
# A command leaves through a thread of its queue. With Python's own interval of 5 ms it would wait for as long
# as the conductor goes on writing down what has happened.
SWITCH_S = 0.0005
# They start other people's programs, in which these signals must keep their usual meaning.
STARTERS = ("grader", "environment", "eval")


@dataclass(frozen=True)
class WorkerSpec:
    """One process: `role` and `rank` name it; `devices` are its CUDA devices, numbered among those visible
    here (empty: the CPU).

    `threads` is its fixed share of the cores; None: all of them, divided among the workers that compute at
    the same time. `index` is the teacher's number, where there are several; `label` then tells them apart.
    `restarts` counts those of its engine. `share` is the fraction of each device that an engine with a fixed
    claim may take (None: as its section says). `whole`: each rank holds the whole model, and none waits for
    another.
    """

    role: WorkerRole
    rank: int
    world: int
    devices: tuple[int, ...]
    threads: int | None
    index: int = 0
    label: str = ""
    restarts: int = 0
    share: float | None = None
    whole: bool = False

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.role, self.label, str(self.rank))))


class Mailbox:
    """A worker's end: commands in, answers out, the pulse, and its share of the cores."""

    def __init__(self, inbox: Any, outbox: Any, pulse: torch.Tensor, cores: Cores | None) -> None:
        self._inbox, self._outbox, self._pulse, self._cores = inbox, outbox, pulse, cores
        self._began, self._spoken = time.monotonic(), False

    def receive(self, block: bool) -> Any:
        """The next command; None if there is none and `block` is False."""
        self.beat()
        if block and self._cores is not None:
            self._cores.rest()
        try:
            message = self._inbox.get(block)
        except queue.Empty:
            return None
        if self._cores is not None:
            self._cores.compute()
        self.beat()
        return message

    def send(self, message: Any) -> None:
        if not self._spoken:
            self._spoken = True
            _log(f"ready after {time.monotonic() - self._began:.1f} s")
        self.post(message)
        self.beat()

    def post(self, message: Any) -> None:
        """Send from any thread: neither the pulse nor the share of the cores is that thread's to set."""
        self._outbox.put(message)

    def beat(self) -> None:
        """Bump the pulse, note peak CUDA memory, and take this worker's current share of the cores."""
        self._pulse[0] = time.monotonic()
        if torch.cuda.is_initialized():
            here = range(torch.cuda.device_count())
            self._pulse[1] = sum(map(torch.cuda.max_memory_allocated, here))
            self._pulse[2] = sum(map(torch.cuda.max_memory_reserved, here))
        if self._cores is not None:
            self._cores.share()


@dataclass
class Worker:
    """The conductor's end. `owed` counts answers that are still due."""

    spec: WorkerSpec
    process: Any
    inbox: Any
    outbox: Any
    pulse: torch.Tensor
    log: Path
    replaceable: bool
    owed: int = 0
    aborts: int = 0  # sent to a sampler
    started: bool = False  # has said that its engine is ready
    sent_at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.spec.name

    def owe(self, answers: int) -> None:
        """Set how many answers it owes; its time to answer starts when that rises above 0."""
        if self.owed <= 0:
            self.sent_at = time.monotonic()
        self.owed = answers


class Fleet:
    """All workers of a run. Use as a context manager: leaving it stops them, an exception kills them.

    A worker that dies, hangs or raises ends the run with a `WorkerError`; one that is `replaceable` is
    stopped and reported as `Lost` instead, among the messages.
    """

    def __init__(self, logs: Path, timeout_s: float, start_timeout_s: float) -> None:
        self.logs, self.timeout_s, self.start_timeout_s = logs, timeout_s, start_timeout_s
        self.workers: dict[str, Worker] = {}
        self._refusals: list[str] = []  # why workers could not start, worded for the user
        self._refused_at = 0.0
        # which workers compute, and each worker's row
        self._computing, self._rows = (cores.table(), dict[str, int]())
        self._context: Any = warm.context()
        self._kills = out_of_memory.kills()
        warm.track()

    def __enter__(self) -> Fleet:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.stop()
        self.kill()
        sys.setswitchinterval(self._interval)

    def start(
        self, spec: WorkerSpec, target: Callable[..., None], *args: Any, replaceable: bool = False
    ) -> Worker:
        """Spawn `target(spec, mailbox, *args)`. Its output goes to `logs/NAME.log`."""
        inbox: Any = self._context.Queue()
        outbox: Any = self._context.Queue()
        # the time of its last beat; peak bytes allocated and reserved on its devices
        pulse = torch.tensor([time.monotonic(), 0, 0], dtype=torch.float64).share_memory_()
        log = self.logs / f"{spec.name}.log"
        row = self._rows.setdefault(spec.name, len(self._rows))
        share = Cores(self._computing, row, cores.here()) if spec.threads is None else None
        ours = environment(spec)
        process = self._context.Process(
            target=_main,
            args=(spec, ours, target, args, inbox, outbox, pulse, share, str(log)),
            name=spec.name,
        )
        with _set(ours), warm.signals_blocked():
            try:
                process.start()
            except (EOFError, OSError) as error:  # the server that forks it is gone, or memory is short
                raise WorkerError(
                    f"{spec.name}: no process could be started ({type(error).__name__}: {error})"
                ) from error
        # With our copy of the write end closed, a worker that dies in mid-message leaves an end of file
        # instead of stalling us.
        outbox._writer.close()
        worker = Worker(spec, process, inbox, outbox, pulse, log, replaceable, owed=1)  # it owes Ready
        self.workers[spec.name] = worker
        return worker

    def send(self, name: str, message: Any, answers: int = 1) -> None:
        """Queue a command; `answers` is how many messages the worker will owe for it.

        Nothing is sent to a lost worker: `receive` has reported the loss, but the caller has not handled it
        yet.
        """
        worker = self.workers.get(name)
        if worker is None:
            return
        worker.owe(worker.owed + answers)
        worker.inbox.put(message)

    def receive(self, timeout: float) -> list[tuple[Worker, Any]]:
        """All pending messages; waits up to `timeout` seconds for the first. A dead or hanging worker raises,
        or is reported as `Lost`.
        """
        readers = {w.outbox._reader: w for w in self.workers.values()}
        sentinels = {w.process.sentinel: w for w in self.workers.values()}
        ready = wait([*readers, *sentinels], timeout)
        messages: list[tuple[Worker, Any]] = []
        for reader in ready:
            if reader in readers:
                messages += self._drain(readers[reader])
        for sentinel in ready:
            worker = sentinels.get(sentinel)
            if worker is not None and self.workers.get(worker.name) is worker:
                messages += self._drain(worker)  # what it said before it died
                if self.workers.get(worker.name) is worker:
                    messages += self._lost(worker, self._death(worker))
        messages += self._check_pulses()
        self._raise_refusals()
        return messages

    def _drain(self, worker: Worker) -> list[tuple[Worker, Any]]:
        messages: list[tuple[Worker, Any]] = []
        while worker.outbox._reader.poll():
            try:
                message = worker.outbox.get()
            except (EOFError, OSError):
                return messages + self._lost(worker, self._death(worker))
            if isinstance(message, Failed):
                return messages + self._failed(worker, message)
            worker.started = True
            worker.owed -= 1
            worker.sent_at = time.monotonic()
            messages.append((worker, message))
        return messages

    def _failed(self, worker: Worker, message: Failed) -> list[tuple[Worker, Any]]:
        if message.kind == "user" and not worker.started:
            self._refusals = list(dict.fromkeys([*self._refusals, message.message]))
            self._refused_at = self._refused_at or time.monotonic()
            self.remove(worker.name)
            return []
        if message.kind == "user" and worker.replaceable:
            self.remove(worker.name)
            return [(worker, Lost(message.message, mistake=True))]
        if message.kind == "user":
            raise UserError(message.message)
        why = out_of_memory.explained(worker.spec.role, message.message, Path(worker.log))
        return self._lost(worker, f"{worker.name} failed: {why} (its log: {worker.log})")

    def _raise_refusals(self) -> None:
        """Raise all that keeps workers from starting, in one message; those still starting get a moment to
        add theirs.
        """
        starting = any(not w.started for w in self.workers.values())
        if self._refusals and not (starting and time.monotonic() - self._refused_at < REFUSAL_WAIT_S):
            raise UserError(" | ".join(self._refusals))

    def _death(self, worker: Worker) -> str:
        worker.process.join(STOP_TIMEOUT_S)
        code = worker.process.exitcode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exited with {code}"
        )
        if code == -signal.SIGKILL and out_of_memory.kills() > self._kills:
            how += f", as the kernel does when main memory runs out; {out_of_memory.advice(worker.spec.role)}"
        if code == -signal.SIGBUS:  # the kernel's answer to memory that it cannot commit
            how += ", as when /dev/shm is full"
        return f"{worker.name} (pid {worker.process.pid}) {how}; its log: {worker.log}"

    def _lost(self, worker: Worker, reason: str) -> list[tuple[Worker, Any]]:
        """The end of a worker, and of the run unless it can be replaced."""
        if not worker.replaceable:
            raise WorkerError(reason)
        self.remove(worker.name)
        return [(worker, Lost(reason))]

    def remove(self, name: str) -> None:
        """Kill a worker and forget it; messages that it may still have sent are discarded."""
        worker = self.workers.pop(name)
        worker.process.kill()
        worker.process.join(STOP_TIMEOUT_S)
        self._computing[self._rows[name]] = 0  # whatever it was doing
        worker.inbox.cancel_join_thread()
        worker.inbox.close()

    def _check_pulses(self) -> list[tuple[Worker, Any]]:
        now, lost = time.monotonic(), []
        for worker in list(self.workers.values()):
            silence = now - max(float(worker.pulse[0]), worker.sent_at)
            limit, key = (
                (self.timeout_s, "timeout_s") if worker.started else (self.start_timeout_s, "start_timeout_s")
            )
            if worker.owed > 0 and silence > limit:
                with contextlib.suppress(OSError):
                    os.kill(worker.process.pid, signal.SIGUSR1)  # faulthandler writes all stacks to its log
                    time.sleep(0.5)
                lost += self._lost(
                    worker,
                    f"{worker.name} (pid {worker.process.pid}) has not moved for {silence:.0f} s "
                    f"(runtime.{key}); its stacks are in {worker.log}",
                )
        return lost

    def memory(self) -> dict[str, int]:
        """Bytes of main memory that each worker holds for itself, without shared memory; empty where the
        system does not say.
        """
        found = {}
        for worker in self.workers.values():
            with contextlib.suppress(OSError):  # not Linux, or it has just died
                found[worker.name] = _own_memory(worker.process.pid)
        return found

    def device_memory(self) -> dict[str, dict[str, int]]:
        """Peak bytes that PyTorch's allocator has handed out and reserved in each worker's own process, over
        all its CUDA devices. Workers without a device are left out, and so are those whose engine runs in
        processes of its own (vLLM, tensor parallel).
        """
        return {
            worker.name: {"allocated": int(worker.pulse[1]), "reserved": int(worker.pulse[2])}
            for worker in self.workers.values()
            if worker.pulse[2] > 0
        }

    def stop(self, roles: Collection[str] | None = None) -> None:
        """Ask all workers, or those of these roles, to stop, and wait a moment."""
        leaving = [w for w in self.workers.values() if roles is None or w.spec.role in roles]
        for worker in leaving:
            worker.inbox.put(StopCommand())
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in leaving:
            worker.process.join(max(0.1, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill all remaining workers."""
        for worker in self.workers.values():
            worker.process.kill()
        for name in list(self.workers):
            self.remove(name)


def _own_memory(pid: int) -> int:
    """Raises `OSError`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(
        int(line.split()[1]) << 10
        for line in status.splitlines()
        if line.startswith(("RssAnon:", "RssFile:"))
    )


def _leave_signals_alone(role: str) -> None:
    """An ignored signal stays ignored in programs that this process executes; a handler does not."""
    for number in STOPPING:
        signal.signal(number, _nothing if role in STARTERS else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _nothing(number: int, frame: Any) -> None:
    """A signal that is not ours."""


def _log(line: str) -> None:
    """Write a line to this worker's log."""
    with contextlib.suppress(OSError):  # the disk may be full
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def failure(error: BaseException) -> Failed:
    """What a worker says of an error that it cannot survive; the traceback goes into its log."""
    with contextlib.suppress(OSError):  # the log may be what filled the disk
        traceback.print_exception(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return Failed("worker", f"{type(error).__name__}: {first}")


def environment(spec: WorkerSpec) -> dict[str, str]:
    """The variables that a worker's libraries must find when first imported; made where the inherited list of
    devices is still in place.
    """
    threads = str(spec.threads or cores.here())
    ours = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if spec.devices:
        ours[devices.VISIBLE] = ",".join(map(devices.entry, spec.devices))
        # The learner's batches vary in shape, which fragments fixed segments; engines that share memory
        # cannot use expandable ones.
        ours["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{spec.role == 'learner'}"
    else:
        ours[devices.VISIBLE] = ""
    return ours


@contextlib.contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
    """Set variables for a while: a spawned process inherits them before it imports torch."""
    saved = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _main(
    spec: WorkerSpec,
    ours: dict[str, str],
    target: Callable[..., None],
    args: tuple[Any, ...],
    inbox: Any,
    outbox: Any,
    pulse: torch.Tensor,
    share: Cores | None,
    log: str,
) -> None:
    """A worker's life: tie it to its parent, send its output to its log, run, and report how it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        conductor = mp.parent_process()
        if conductor is None or not conductor.is_alive():
            os._exit(1)  # it died before we were tied to it
    os.environ.update(ours)  # a forked process has its server's environment
    _leave_signals_alone(spec.role)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(spec.threads or cores.here())
    mailbox = Mailbox(inbox, outbox, pulse, share)
    mailbox.beat()  # its first beat: start_timeout_s counts from here
    where = f"CUDA devices {ours[devices.VISIBLE]}" if spec.devices else "the CPU"
    _log(
        f"{spec.name}{out_of_memory.STARTS}{os.getpid()}, on {where}, "
        f"{spec.threads or 'up to ' + str(cores.here())} threads"
    )
    try:
        target(spec, mailbox, *args)
        _log(f"{spec.name} ends")
    except UserError as error:
        _log(f"{spec.name} gives up: {error}")
        if error.__cause__ is not None:  # what the user's own task raised
            traceback.print_exception(error.__cause__)
        mailbox.send(Failed("user", str(error)))
    except BaseException as error:
        mailbox.send(failure(error))
    outbox.close()
    outbox.join_thread()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(0)  # skips the interpreter's teardown, in which gloo's threads sometimes abort the process
