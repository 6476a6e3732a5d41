"""Turns between real processes: what is told when, where a device can hold both roles of a turn and where
not, and what happens if one of them dies meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from conftest import small_recipe

from fopd_cli.errors import WorkerError
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.build import Setup
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew import processes, warm
from fopd_cli.runtime.crew.fleet import Mailbox, WorkerSpec
from fopd_cli.runtime.crew.processes import Processes
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import TURNS, Turn, place
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.weights.transport import Shared
from fopd_cli.samples import TargetSpec

HERE = 120.0  # seconds after which a process that waits for another one fails
SAMPLERS = ("sampler-0", "sampler-1")

Until = Callable[[Path], None]


# ---- in the workers ----------------------------------------------------------------------------------------


def lines(folder: Path) -> list[str]:
    """What all workers have written down, in the order in which it happened."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "diary").read_text().splitlines()
    return []


def poll(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HERE
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


def at_once(folder: Path) -> None:
    pass


def when(line: str, folder: Path) -> None:
    """Waits for a line in the diary."""
    poll(lambda: line in lines(folder))


def when_dead(name: str, folder: Path) -> None:
    """Waits until the conductor has seen that a worker that dies is dead: it then no longer exists."""

    def dead() -> bool:
        pids = [int(line.split()[-1]) for line in lines(folder) if line.startswith(f"{name} dies, ")]
        return bool(pids) and not psutil.pid_exists(pids[0])

    poll(dead)


def actor(
    spec: WorkerSpec,
    mailbox: Mailbox,
    setup: Setup,
    sleeps: Until = at_once,
    wakes: Until = at_once,
    dies: tuple[str, ...] = (),
) -> None:
    """Keeps the diary. From its first turn on, it sleeps and wakes for as long as `sleeps` and `wakes` take.
    `dies`: `NAME sleeps` or `NAME wakes` kills that worker, the first time.
    """
    folder, had_turn = setup.rendezvous.parent, False

    def note(what: str) -> None:
        with (folder / "diary").open("a") as file:
            file.write(f"{spec.name} {what}\n")

    def come_to(what: str, until: Until) -> None:
        if f"{spec.name} {what}" in dies and spec.restarts == 0:
            until(folder)
            note(f"dies, {os.getpid()}")
            os.kill(os.getpid(), signal.SIGKILL)
        note(what)
        until(folder)

    note(f"starts, {spec.restarts}")
    mailbox.send(m.Ready())
    while not isinstance(command := mailbox.receive(block=True), m.StopCommand):
        if isinstance(command, m.WakeCommand):
            had_turn = True
            come_to("wakes", wakes)
            note("is awake")
            mailbox.send(m.Awake())
        elif isinstance(command, m.SleepCommand):
            if had_turn:
                come_to("sleeps", sleeps)
            note("is asleep")
            mailbox.send(m.Asleep())


# ---- in the conductor --------------------------------------------------------------------------------------


class Crew:
    """Two samplers, a teacher and a learner on a CPU. It is the samplers' turn, and the diary is blank."""

    def __init__(self, folder: Path, overlaps: tuple[Turn, ...]) -> None:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(small_recipe(folder, placement={"mode": "timeslice", "sampler": 2})))
        recipe = load_recipe(path)
        plan = replace(place(recipe, 0, 2), overlaps=overlaps)
        channel = Shared(WeightChannel.create([]))
        targets = (TargetSpec("topk", 4, torch.float32),)
        meeting = folder / ".rendezvous-test"
        setup = Setup(recipe, 260, targets, (None,), 64, 64, torch.empty(0), channel, meeting)
        self.folder, self.said, self.told = folder, list[str](), list[str]()
        self.crew = Processes(plan, setup, folder, False, Signals(self.said.append), self.said.append)

    def turn(self, sleeper: Any, waker: Any) -> list[m.Event]:
        """What the conductor hears of one change of turns."""
        (self.folder / "diary").write_text("")
        self.told.clear()
        self.crew.lease(sleeper, waker)
        return [event for _, event in self.crew.receive()]

    @property
    def diary(self) -> list[str]:
        return lines(self.folder)

    def _watch(self) -> None:
        """Note what is sent and what comes back."""
        fleet: Any = self.crew.fleet
        send, receive = fleet.send, fleet.receive

        def sending(name: str, command: Any, answers: int = 1) -> None:
            self.told.append(f"{type(command).__name__} to {name}")
            send(name, command, answers)

        def receiving(timeout: float) -> Any:
            found = receive(timeout)
            self.told += [f"{type(message).__name__} from {worker.name}" for worker, message in found]
            return found

        fleet.send, fleet.receive = sending, receiving

    def __enter__(self) -> Crew:
        self.crew.__enter__()
        self._watch()
        self.crew.start()
        self.turn(None, "sampler")
        return self

    def __exit__(self, *error: Any) -> None:
        self.crew.__exit__(*error)


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """Workers are forked from one process, as on any machine without a GPU: five of them start in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "_begun", False)  # as it is again afterwards
        warm.begin()
        yield
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Says how a role's workers act."""

    def acting(role: str, **how: Any) -> None:
        monkeypatch.setitem(processes.MAINS, role, partial(actor, **how))

    for role in processes.MAINS:
        acting(role)
    return acting


def before(found: list[str], first: str, then: str) -> bool:
    return found.index(first) < found.index(then)


def test_where_both_fit_the_next_role_wakes_while_the_last_one_falls_asleep(tmp_path: Path, act: Any) -> None:
    """The samplers are not asleep before the teacher is awake: one after the other would never end."""
    act("sampler", sleeps=partial(when, "teacher-0 is awake"))
    with Crew(tmp_path, (("sampler", "teacher"),)) as crew:
        assert crew.turn("sampler", "teacher") == [m.Leased("teacher")]
        told = [f"SleepCommand to {name}" for name in SAMPLERS] + ["WakeCommand to teacher-0"]
        assert crew.told[:3] == told
        done = [*(f"Asleep from {name}" for name in SAMPLERS), "Awake from teacher-0"]
        assert sorted(crew.told[3:]) == done


def test_the_turn_begins_when_both_are_done(tmp_path: Path, act: Any) -> None:
    """Whoever is done last, the box is leased only then: no one computes beside one who is still awake."""
    act("sampler", sleeps=partial(when, "teacher-0 is awake"))
    act("learner", wakes=partial(when, "teacher-0 is asleep"))
    with Crew(tmp_path, TURNS) as crew:
        for sleeper, waker, done in (
            ("sampler", "teacher", ["sampler-0 is asleep", "sampler-1 is asleep"]),
            ("teacher", "learner", ["learner-0 is awake"]),
        ):
            assert crew.turn(sleeper, waker) == [m.Leased(waker)]
            assert set(done) <= set(crew.diary)
            assert crew.diary[-1] in done


def test_where_they_do_not_fit_one_is_asleep_before_the_next_is_told_to_wake(
    tmp_path: Path, act: Any
) -> None:
    """The turn before, which overlaps, does not matter."""
    with Crew(tmp_path, (("sampler", "learner"), ("teacher", "sampler"))) as crew:
        assert crew.turn("sampler", "teacher") == [m.Leased("teacher")]
        for name in SAMPLERS:
            assert before(crew.told, f"Asleep from {name}", "WakeCommand to teacher-0")
            assert before(crew.diary, f"{name} is asleep", "teacher-0 wakes")


@pytest.mark.parametrize("overlaps", [TURNS, ()], ids=["overlapping", "apart"])
def test_a_role_that_dies_as_it_wakes_is_restarted_when_the_other_is_asleep(
    tmp_path: Path, act: Any, overlaps: tuple[Turn, ...]
) -> None:
    """The samplers stay awake until the conductor has seen the death, where the turns overlap."""
    act("teacher", dies=("teacher-0 wakes",))
    if overlaps:
        act("sampler", sleeps=partial(when_dead, "teacher-0"))
    with Crew(tmp_path, overlaps) as crew:
        events = crew.turn("sampler", "teacher")
        assert [type(event) for event in events] == [m.EngineLost, m.EngineBack, m.Leased]
        for name in SAMPLERS:
            assert before(crew.diary, f"{name} is asleep", "teacher-0 starts, 1")
        assert "SIGKILL" in crew.said[-1]
        assert "restarting it (1 of" in crew.said[-1]
        assert crew.turn("teacher", "sampler") == [m.Leased("sampler")]
        assert "teacher-0 is asleep" in crew.diary


@pytest.mark.parametrize("overlaps", [TURNS, ()], ids=["overlapping", "apart"])
def test_one_that_dies_as_it_falls_asleep_is_restarted_at_its_next_turn(
    tmp_path: Path, act: Any, overlaps: tuple[Turn, ...]
) -> None:
    """The teacher is not awake before, where the turns overlap."""
    act("sampler", dies=("sampler-1 sleeps",))
    if overlaps:
        act("teacher", wakes=partial(when_dead, "sampler-1"))
    with Crew(tmp_path, overlaps) as crew:
        events = crew.turn("sampler", "teacher")
        assert [type(event) for event in events] == [m.EngineLost, m.EngineBack, m.Leased]
        assert "sampler-1" not in crew.crew.fleet.workers
        assert crew.turn("teacher", "sampler") == [m.Leased("sampler")]
        assert before(crew.diary, "teacher-0 is asleep", "sampler-1 starts, 1")
        assert before(crew.diary, "sampler-0 is awake", "sampler-1 starts, 1")


@pytest.mark.parametrize("overlaps", [TURNS, ()], ids=["overlapping", "apart"])
def test_a_learner_that_dies_as_it_wakes_ends_the_run_and_everyone_in_it(
    tmp_path: Path, act: Any, overlaps: tuple[Turn, ...]
) -> None:
    """Although the samplers, where the turns overlap, never come to an end."""
    act("learner", dies=("learner-0 wakes",))
    if overlaps:
        act("sampler", sleeps=partial(when, "this is never written"))
    family: list[Any] = []

    def turn() -> None:
        with Crew(tmp_path, overlaps) as crew:
            family.extend(worker.process for worker in crew.crew.fleet.workers.values())
            crew.turn("sampler", "learner")

    with pytest.raises(WorkerError, match=r"learner-0 \(pid \d+\) was killed by SIGKILL"):
        turn()
    assert len(family) == 5
    assert not any(process.is_alive() for process in family)
