"""The fleet with small real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch
from conftest import SLOW, wait_for

from fopd_cli.errors import UserError
from fopd_cli.runtime.crew import fleet as workers
from fopd_cli.runtime.crew import out_of_memory, warm
from fopd_cli.runtime.crew.fleet import SWITCH_S, Fleet, Mailbox, Worker, WorkerSpec
from fopd_cli.runtime.crew.messages import Lost, Ready, StopCommand

SPEC = WorkerSpec("sampler", 0, 1, (), 1)


def echo(spec: WorkerSpec, mailbox: Mailbox) -> None:
    mailbox.send(Ready())
    while not isinstance(command := mailbox.receive(block=True), StopCommand):
        mailbox.send(command)


def heard(fleet: Fleet, count: int) -> list[tuple[Worker, object]]:
    messages: list[tuple[Worker, object]] = []
    deadline = time.monotonic() + 60
    while len(messages) < count and time.monotonic() < deadline:
        messages += fleet.receive(timeout=0.5)
    return messages


def test_a_lost_worker_is_reported_after_its_last_words_and_sent_nothing_more(tmp_path: Path) -> None:
    """A caller that handles messages in order may send before it reaches the report: no error, no answer."""
    with Fleet(tmp_path, 60, 60) as fleet:
        worker = fleet.start(SPEC, echo, replaceable=True)
        heard(fleet, 1)
        fleet.send("sampler-0", "last words")
        wait_for(worker.outbox._reader.poll, "its last words")
        worker.process.kill()
        worker.process.join()
        (first, second) = (message for _, message in heard(fleet, 2))
        assert first == "last words"
        assert isinstance(second, Lost)
        assert "SIGKILL" in second.reason
        fleet.send("sampler-0", "are you there?")
        assert fleet.receive(timeout=0.2) == []


def refusing(spec: WorkerSpec, mailbox: Mailbox) -> None:
    raise UserError(f"{spec.role}.packing: this architecture cannot be packed")


def test_all_that_keeps_workers_from_starting_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "REFUSAL_WAIT_S", 120.0)  # a busy machine starts them far apart
    with Fleet(tmp_path, 60, 60) as fleet:
        fleet.start(WorkerSpec("learner", 0, 1, (), 1), refusing)
        fleet.start(WorkerSpec("teacher", 0, 1, (), 1), refusing, replaceable=True)
        fleet.start(SPEC, echo, replaceable=True)
        with pytest.raises(UserError) as caught:
            heard(fleet, 9)
    said = str(caught.value).split(" | ")
    assert sorted(said) == [
        f"{role}.packing: this architecture cannot be packed" for role in ("learner", "teacher")
    ]
    log = (tmp_path / "learner-0.log").read_text()
    assert "learner-0 starts: pid" in log
    assert "learner-0 gives up: learner.packing" in log


def mistaken(spec: WorkerSpec, mailbox: Mailbox) -> None:
    mailbox.send(Ready())
    mailbox.receive(block=True)
    raise UserError("task.name: mine:Mine: grade() raised KeyError")


def test_a_mistake_of_the_users_is_told_apart_from_a_worker_that_broke(tmp_path: Path) -> None:
    with Fleet(tmp_path, 60, 60) as fleet:
        fleet.start(SPEC, mistaken, replaceable=True)
        heard(fleet, 1)
        fleet.send("sampler-0", "go")
        ((_, lost),) = heard(fleet, 1)
    assert lost == Lost("task.name: mine:Mine: grade() raised KeyError", mistake=True)
    assert "ready after" in (tmp_path / "sampler-0.log").read_text()


NO_ROOM = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which "
    "21.44 MiB is free. Process 4788 has 4.51 GiB memory in use. Including ... this process has ..."
)


def out_of_device_memory(spec: WorkerSpec, mailbox: Mailbox) -> None:
    """In PyTorch's words, and in those of vLLM's kernels (seen on an H200)."""
    if spec.role != "sampler":
        raise torch.OutOfMemoryError(NO_ROOM)
    print(f"[rank0]:[E1126 11:22:03 shim.cpp:523] Exception in aoti_torch: {NO_ROOM}", file=sys.stderr)
    raise RuntimeError(
        'torch_call_dispatcher( "aten::new_empty", "", ...) API call failed at ops.h, line 939'
    )


def out_of_main_memory(spec: WorkerSpec, mailbox: Mailbox) -> None:
    torch.empty(1 << 55)


@pytest.mark.parametrize(
    ("role", "target", "cause", "advice"),
    [
        ("learner", out_of_device_memory, "21.44 MiB is free; ", "learner.micro_tokens"),
        ("sampler", out_of_device_memory, "21.44 MiB is free; ", "sampler.vllm.gpu_memory"),
        ("teacher", out_of_main_memory, "out of main memory (", "teacher.micro_tokens"),
    ],
)
def test_a_worker_that_ran_out_of_memory_is_told_what_takes_less(
    tmp_path: Path, role: Literal["learner", "sampler", "teacher"], target: Any, cause: str, advice: str
) -> None:
    with Fleet(tmp_path, 60, 60) as fleet:
        fleet.start(WorkerSpec(role, 0, 1, (), 1), target, replaceable=True)
        ((_, lost),) = heard(fleet, 1)
    assert isinstance(lost, Lost)
    assert lost.reason.startswith(f"{role}-0 failed: ")
    assert cause in lost.reason
    assert advice in lost.reason
    assert "Process 4788" not in lost.reason


def waiting(spec: WorkerSpec, mailbox: Mailbox) -> None:
    mailbox.send(Ready())
    mailbox.receive(block=True)


def test_a_worker_that_the_kernel_killed_for_memory_is_told_from_one_that_someone_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts what it kills; its count stands in a file here."""
    count = tmp_path / "vmstat"
    monkeypatch.setattr(out_of_memory, "VMSTAT", count)
    reasons = []
    for after in (7, 8):
        count.write_text("pgfault 5\noom_kill 7\n")
        with Fleet(tmp_path, 60, 60) as fleet:
            worker = fleet.start(SPEC, waiting, replaceable=True)
            heard(fleet, 1)
            count.write_text(f"pgfault 9\noom_kill {after}\n")
            worker.process.kill()
            ((_, lost),) = heard(fleet, 1)
        assert isinstance(lost, Lost)
        reasons.append(lost.reason)
    assert "memory" not in reasons[0]
    assert "SIGKILL, as the kernel does when main memory runs out; lower sampler.concurrency" in reasons[1]


def out_of_memory_once(spec: WorkerSpec, mailbox: Mailbox) -> None:
    if spec.restarts == 0:
        out_of_device_memory(spec, mailbox)
    raise RuntimeError("another fault")


def test_what_a_log_says_of_a_process_before_is_not_said_of_this_one(tmp_path: Path) -> None:
    with Fleet(tmp_path, 60, 60) as fleet:
        found = []
        for restarts in (0, 1):
            fleet.start(replace(SPEC, restarts=restarts), out_of_memory_once, replaceable=True)
            ((_, lost),) = heard(fleet, 1)
            assert isinstance(lost, Lost)
            found.append(lost.reason)
    assert "CUDA out of memory" in found[0]
    assert found[1].startswith("sampler-0 failed: RuntimeError: another fault")


def describe(spec: WorkerSpec, mailbox: Mailbox) -> None:
    mailbox.send(
        (os.environ["OMP_NUM_THREADS"], torch.get_num_threads(), "transformers.modeling_utils" in sys.modules)
    )
    mailbox.receive(block=True)


@SLOW
def test_forked_workers_have_their_own_environment_and_die_with_their_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "_begun", False)  # as it is again afterwards
    warm.begin()
    try:
        with Fleet(tmp_path, 60, 60) as fleet:
            for index, threads in enumerate((1, 2)):
                fleet.start(WorkerSpec("sampler", index, 2, (), threads), describe, replaceable=True)
            assert sorted(message for _, message in heard(fleet, 2)) == [("1", 1, True), ("2", 2, True)]
            forked = [psutil.Process(worker.process.pid) for worker in fleet.workers.values()]
            (server,) = {worker.ppid() for worker in forked}
            assert server == forkserver._forkserver._forkserver_pid != os.getpid()  # type: ignore[attr-defined]
            os.kill(server, signal.SIGKILL)
            wait_for(lambda: not any(worker.is_running() for worker in forked), "the workers to follow", 10)
            assert {type(message) for _, message in heard(fleet, 2)} == {Lost}
            fleet.start(SPEC, echo)  # another server
            assert isinstance(heard(fleet, 1)[0][1], Ready)
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def test_workers_are_forked_beside_a_driver_only_if_no_device_is_visible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(warm, "DRIVERS", (str(tmp_path),))
    for devices, forked in ((None, False), ("0", False), ("", True)):
        if devices is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
        assert warm.may_fork() is forked
    monkeypatch.setattr(warm, "DRIVERS", (str(tmp_path / "missing"),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert warm.may_fork()


def test_while_workers_run_their_commands_wait_for_no_python_of_the_conductor(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    with Fleet(tmp_path, 60, 60):
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert before > SWITCH_S
    assert sys.getswitchinterval() == before


def breathing(spec: WorkerSpec, mailbox: Mailbox) -> None:
    while True:
        mailbox.beat()
        time.sleep(0.1)


def loading(spec: WorkerSpec, mailbox: Mailbox) -> None:
    """Hangs while it loads its model: nothing after its first breath."""
    time.sleep(600)


def test_the_time_to_start_counts_from_a_workers_first_breath(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from when its process was requested: its imports may come from a slow disk. By a clock of our own:
    nothing is lost when the time is over that counts from the request, and the worker when its own is.
    """
    allowed = 300.0
    with Fleet(tmp_path, 60, allowed) as fleet:
        worker = fleet.start(SPEC, loading, replaceable=True)
        asked_for = float(worker.pulse[0])
        wait_for(lambda: float(worker.pulse[0]) > asked_for, "its first breath", 60)
        breathed = float(worker.pulse[0])
        assert not worker.started
        now = (asked_for + breathed) / 2 + allowed
        clock = SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
        monkeypatch.setattr(workers, "time", clock)
        assert fleet.receive(timeout=0) == []
        now = breathed + allowed + 1
        ((lost, message),) = fleet.receive(timeout=0)
        assert lost is worker
        assert isinstance(message, Lost)
        assert "has not moved for 301 s (runtime.start_timeout_s)" in message.reason
        monkeypatch.undo()


def allocating(spec: WorkerSpec, mailbox: Mailbox) -> None:
    """What the allocator of two fake devices says."""
    torch.cuda.is_initialized = lambda: spec.rank == 0
    torch.cuda.device_count = lambda: 2
    torch.cuda.max_memory_allocated = lambda device: (7 * 10**9, 2 * 10**9)[device]
    torch.cuda.max_memory_reserved = lambda device: (9 * 10**9, 3 * 10**9)[device]
    mailbox.send(Ready())
    mailbox.receive(block=True)


def test_memory_of_all_devices_is_known_of_those_that_have_any(tmp_path: Path) -> None:
    with Fleet(tmp_path, 60, 60) as fleet:
        for rank in (0, 1):
            fleet.start(WorkerSpec("learner", rank, 2, (), 1), allocating)
        heard(fleet, 2)
        wait_for(fleet.device_memory, "a beat that says it", 10)
        assert fleet.device_memory() == {"learner-0": {"allocated": 9 * 10**9, "reserved": 12 * 10**9}}
