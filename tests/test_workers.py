"""The fleet with small real processes."""

from __future__ import annotations

import time
from pathlib import Path

from fopd_cli.runtime.messages import Lost, Ready, StopCommand
from fopd_cli.runtime.workers import Fleet, Mailbox, Worker, WorkerSpec

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
    """Whoever handles the messages in order sends before coming to the one that says so: no error, and no answer."""
    with Fleet(tmp_path, 60, 60) as fleet:
        worker = fleet.start(SPEC, echo, replaceable=True)
        heard(fleet, 1)
        fleet.send("sampler-0", "last words")
        time.sleep(1)
        worker.process.kill()
        worker.process.join()
        (first, second) = (message for _, message in heard(fleet, 2))
        assert first == "last words"
        assert isinstance(second, Lost)
        assert "SIGKILL" in second.reason
        fleet.send("sampler-0", "are you there?")
        assert fleet.receive(timeout=0.2) == []
