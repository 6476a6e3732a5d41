"""Checkpoints that are completed while a run goes on: engines that do no work, a learner that writes
slowly, real checkpoints on a disk.
"""

from __future__ import annotations

import errno
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import load_file

from fopd_cli.errors import UserError
from fopd_cli.inputs import Inputs, load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime import buffer
from fopd_cli.runtime.buffer import Buffer
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.inprocess import InProcess
from fopd_cli.runtime.crew.pretend import Pretend
from fopd_cli.runtime.crew.writer import Writer
from fopd_cli.runtime.journal.buffer_file import load_buffer
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, described, verify
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.saving import Saver
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.memory.held import Held
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.scheduling.tickets import Ticket
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.samples import Rollout

STEPS = 9
FULL = "[Errno 28] No space left on device"


def inputs(*overrides: str) -> Inputs:
    small = ["learner.batch_samples=8", "sampler.concurrency=3", "teacher.batch_samples=4", "eval.samples=1"]
    run = [f"learner.steps={STEPS}", "eval.every=9", "task.eval_prompts=8", "checkpoint.keep=99"]
    parsed = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*small, *run, *overrides])
    return load_inputs(parsed, place(parsed, 0))


def marks(number: int, nbytes: int) -> np.ndarray:
    """A sample's targets: bytes that no other has."""
    return np.random.Generator(np.random.PCG64(number)).integers(0, 256, nbytes, np.uint8)


class Learner(Pretend):
    """Publishes and writes: weights that are the version's number, and a file with the step; its teacher's
    targets are `marks`. `full`: steps at which the disk is.
    """

    def __init__(self, channel: WeightChannel, buffer: Buffer, full: Sequence[int]) -> None:
        super().__init__()
        self.channel, self.buffer, self.full, self.version = channel, buffer, full, 0
        self.saves: list[m.SaveCommand] = []
        self.marks_of: Callable[[int], int] = lambda key: key
        self.publish(0)

    def publish(self, version: int) -> None:
        self.version = version
        weights = ((name, torch.full(shape, float(version))) for name, shape, _ in self.channel.layout)
        self.channel.write(version, weights)

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        answers = super().do(engine, command)
        if isinstance(command, m.ScoreCommand):
            for rollout, region in zip(command.rollouts, command.regions, strict=True):
                marked = marks(self.marks_of(rollout.key), self.buffer.specs[0].nbytes(region.positions))
                self.buffer.arena.memory.numpy()[region.offset :][: len(marked)] = marked
        if isinstance(command, m.TrainCommand):
            self.publish(command.step + 1)
        if isinstance(command, m.SaveCommand):
            self.saves.append(command)
            command.folder.mkdir()
            file = command.folder / "state"
            file.write_text(str(self.version))
            saved = m.Saved({"version": self.version}, answers[1].span, files={"state": described(file)})
            if self.version in self.full:
                saved = m.Saved({}, answers[1].span, FULL)
            return [answers[0], saved]
        return answers


class Slow:
    """A save takes `save` after `Staged`; everything else as long as it happens to."""

    def __init__(self, save: float) -> None:
        self.save, self.rng = save, random.Random(0)

    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> list[float]:
        if isinstance(command, m.SaveCommand):
            return [now + 1, now + 1 + self.save]
        return list(itertools.accumulate((self.rng.uniform(1, 3) for _ in answers), initial=now))[1:]

    def stopped(self, now: float, engine: Engine) -> None: ...


class Overheard(InProcess):
    """A crew whose commands to the learner, publications, and answers to a save are noted. `idle` is called
    while nothing can go on before a thread of the saver's has.
    """

    def __init__(self, engines: Pretend, cost: Slow, note: Callable[[str], None]) -> None:
        super().__init__(engines, cost)
        self._note = note
        self.idle: Callable[[], object] = lambda: time.sleep(0.001)

    def send(self, engine: Engine, command: m.Command) -> None:
        if isinstance(command, m.TrainCommand | m.SaveCommand):
            self._note(type(command).__name__)
        super().send(engine, command)

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        if not self._events:
            self.idle()
            return
        for engine, event in super().receive():
            if isinstance(event, m.Saved | m.Published):
                self._note(type(event).__name__)
            yield engine, event


class Run:
    """A whole run with checkpoints; `log` says in which order things happened to the learner."""

    def __init__(self, folder: Path, found: Inputs, save: float, full: Sequence[int] = ()) -> None:
        self.state, self.records, self.log = State(found), Recorded(), list[tuple[str, int]]()
        channel = WeightChannel.create(found.published)
        self.learner = Learner(channel, self.state.buffer, full)
        self.crew = Overheard(self.learner, Slow(save), self._note)
        self.run_dir, self.store = RunDir(folder), CheckpointStore(folder / "checkpoints")
        self.journal = Journal(found.recipe, found.tokenizer, lambda *_: self.records, quiet=True)
        self.saver = Saver(self.state, self.run_dir, self.journal, channel, torch.float32)
        self.conductor: Any = Conductor(
            self.state, self.crew, self.journal, self.saver, Signals(self.journal.say)
        )

    def _note(self, what: str) -> None:
        self.log.append((what, self.state.schedule.step))

    def run(self) -> Run:
        with self.journal:
            self.conductor.run()
        return self

    def checkpoint(self, step: int) -> dict[str, Any]:
        assert verify(self.store.path(step)) is None
        return self.store.state(step)


def test_the_run_goes_on_while_a_save_is_written_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=60).run()
    assert [e for e in run.log if e[0] in ("SaveCommand", "Saved")][:5] == [
        ("SaveCommand", 3),
        ("Saved", 6),
        ("SaveCommand", 6),
        ("Saved", 9),
        ("SaveCommand", 9),
    ]
    assert [c.staged for c in run.learner.saves] == [True, True, False], "nothing goes on beside the last one"
    assert run.store.steps() == [3, 6, 9]
    for step in run.store.steps():
        found = run.checkpoint(step)
        assert found["learner"] == {"version": step}
        assert found["schedule"]["step"] == step, "as of its own step, not of when it was completed"
    assert [r["step"] for r in run.records.metrics.kind("step")] == list(range(1, STEPS + 1))


def test_the_conductor_goes_on_while_the_buffer_is_written_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes nothing until nothing else is left to do. Meanwhile the run has trained on the samples
    that are being saved, and given their memory to others; only its next save waits.
    """
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=5)
    gate, written = threading.Event(), buffer.write_buffer
    saved: dict[int, Any] = {}
    overwritten = []

    def write(path: Path, rollouts: list[Rollout], targets: Any) -> Any:
        assert gate.wait(60), "the conductor waits for the disk"
        return written(path, rollouts, targets)

    def snapshot(keys: Any, scored: Any) -> Any:
        entries = {key: run.state.buffer[key].targets for key in scored}
        saved[run.state.schedule.step] = entries, sorted(keys)
        return snapshotted(keys, scored)

    def idle() -> None:
        if not gate.is_set():
            assert run.state.schedule.step == 6
            assert [e[0] for e in run.log if e[0] in ("SaveCommand", "Saved")] == ["SaveCommand", "Saved"]
            for key, region in saved[3][0].items():
                now = run.state.buffer.arena.memory.numpy()[region.offset :]
                then = marks(key, run.state.buffer.specs[0].nbytes(region.positions))
                overwritten.append((now[: len(then)] != then).any())
            assert not run.store.steps()
        gate.set()

    snapshotted = run.state.buffer.snapshot
    monkeypatch.setattr(buffer, "write_buffer", write)
    monkeypatch.setattr(run.state.buffer, "snapshot", snapshot)
    run.crew.idle = idle
    run.run()
    assert any(overwritten), "their memory was used again"
    assert run.store.steps() == [3, 6, 9]
    for step in run.store.steps():
        described = run.checkpoint(step)["rollouts"]
        rollouts, targets = load_buffer(run.store.path(step) / "buffer.safetensors", described)
        entries, keys = saved[step]
        assert [r.key for r in rollouts] == keys
        assert targets.keys() == entries.keys()
        for key, raw in targets.items():
            assert np.array_equal(raw, marks(key, len(raw)))
            assert len(raw) == run.state.buffer.specs[0].nbytes(entries[key].positions)


def test_labels_of_a_save_are_those_before_a_teacher_judges_again(tmp_path: Path) -> None:
    run = Run(tmp_path, inputs(), save=5)
    state = run.state
    state.schedule.tickets[0] = Ticket(0, state.inputs.stream.train_id(0))
    request = run.conductor._request(0)
    ids = np.concatenate([request.token_ids, np.zeros(3, np.int32)])
    rollout = Rollout(0, ids, len(ids) - 3, np.ones(3, bool), np.zeros(3, np.float32), [(0, 0, 3)], "stop")
    entry = state.buffer.add(rollout, teacher=0)
    assert state.buffer.reserve([0])
    run.conductor._score(0, [entry], False)
    snapshot = state.buffer.snapshot([0], [0])
    run.learner.marks_of = lambda key: key + 1000
    run.conductor._score(0, [entry], True)
    snapshot.write(tmp_path / "b")
    _, targets = load_buffer(tmp_path / "b", snapshot.state["rollouts"])
    assert np.array_equal(targets[0], marks(0, len(targets[0])))


def test_a_save_begins_once_the_version_of_its_step_is_published(tmp_path: Path) -> None:
    """Its learner's next step does not, where nothing is saved."""
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=5).run()
    before = {e: run.log[i - 1] for i, e in enumerate(run.log) if e[0] != "Saved"}
    assert [before["SaveCommand", step] for step in (3, 6, 9)] == [("Published", s) for s in (3, 6, 9)]
    assert before["TrainCommand", 1] == ("TrainCommand", 0)
    assert run.log.index(("TrainCommand", 1)) < run.log.index(("Published", 1))


def test_a_save_is_a_checkpoint_only_when_all_of_it_is_there(tmp_path: Path) -> None:
    """Killed while one is under way, at any time before the learner has reported: the one before stands."""
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=60)
    reached: list[list[int]] = []

    class Killed(Exception):
        pass

    def kill(engine: Engine, event: m.Event) -> None:
        reached.append(run.store.steps())
        if isinstance(event, m.Saved) and run.state.schedule.step == 9:
            raise Killed
        heard(engine, event)

    heard, run.conductor._handle = run.conductor._handle, kill
    with pytest.raises(Killed):
        run.run()
    assert (tmp_path / "checkpoints" / "step-000006.tmp").is_dir()
    assert run.store.newest_sound() == (3, [])
    assert [] in reached
    assert [3] in reached
    CheckpointStore(tmp_path / "checkpoints").open(3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_published_weights_of_before_are_kept_as_they_were(tmp_path: Path) -> None:
    """Under a fixed lag a checkpoint may hold the version before its step, whose slot is overwritten long
    before the save is complete.
    """
    run = Run(tmp_path, inputs("schedule.lag=2", "checkpoint.every=2"), save=11).run()
    held = []
    for step in run.store.steps():
        version = run.checkpoint(step)["schedule"]["resume_version"]
        if version < step:
            data = (run.store.path(step) / "published.bin").read_bytes()
            channel = run.learner.channel
            restored = WeightChannel.create(channel.layout)
            restored.load(version, run.store.path(step) / "published.bin", [d for _, _, d in channel.layout])
            assert len(data) == channel.slot_bytes
            assert all(bool((tensor == version).all()) for _, tensor in restored.read(version))
            held.append(step)
    assert held, "at some step the samplers were still at the version before"


def test_the_next_step_waits_for_the_slot_that_it_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, inputs("schedule.lag=2", "checkpoint.every=2"), save=0)
    asked, save, let_train = threading.Event(), WeightChannel.save, run.saver.let_train

    def slowly(channel: WeightChannel, version: int, path: Path) -> None:
        assert asked.wait(60), "the conductor waits for the disk"
        save(channel, version, path)
        run.log.append(("written", version))

    def about_to_train() -> None:
        asked.set()
        let_train()
        asked.clear()

    monkeypatch.setattr(WeightChannel, "save", slowly)
    monkeypatch.setattr(run.saver, "let_train", about_to_train)
    run.run()
    written = [version for what, version in run.log if what == "written"]
    assert written, "at some step the samplers were still at the version before"
    for version in written:
        place = run.log.index(("written", version))
        assert place < run.log.index(("TrainCommand", version + 1))


def test_a_disk_that_is_full_in_the_background_is_said_and_loses_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=5, full=[6]).run()
    (warning,) = (r for r in run.records.warnings if "NO CHECKPOINT" in r["text"])
    assert warning["step"] == 6
    assert FULL in warning["text"]
    assert "older checkpoints are intact" in warning["text"]
    assert run.store.steps() == [3, 9]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_disk_that_is_full_for_the_buffer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the learner has written is removed, and the buffer's memory is not held any more."""
    run = Run(tmp_path, inputs("schedule.max_lag=2", "checkpoint.every=3"), save=5)
    written = buffer.write_buffer

    def write(path: Path, rollouts: list[Rollout], targets: Held) -> Any:
        if path.parent.name.startswith("step-000006"):
            path.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(path, rollouts, targets)

    monkeypatch.setattr(buffer, "write_buffer", write)
    run.run()
    (warning,) = (r for r in run.records.warnings if "NO CHECKPOINT" in r["text"])
    assert warning["step"] == 6
    assert FULL in warning["text"]
    assert run.store.steps() == [3, 9]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_only_the_last_save_must_succeed(tmp_path: Path) -> None:
    run = Run(tmp_path, inputs("schedule.max_lag=0", "checkpoint.every=6"), save=5, full=[9])
    with pytest.raises(UserError, match=r"cannot save step 9: .*No space left.* \(from step 6\)"):
        run.run()
    assert run.store.steps() == [6]


def test_without_copies_the_learner_waits_for_the_disk(tmp_path: Path) -> None:
    found = inputs("schedule.max_lag=2", "checkpoint.every=3", "checkpoint.asynchronous=false")
    run = Run(tmp_path, found, save=0)
    save, read = run.saver.save, []

    def waits(final: bool, learner: Callable[[Path], None]) -> bool:
        begun = save(final, learner)
        if not final:
            folder = tmp_path / "checkpoints" / f"step-{run.state.schedule.step:06d}.tmp"
            read.append(load_file(folder / "buffer.safetensors"))
        return begun

    run.saver.save = waits  # type: ignore[method-assign]
    run.run()
    assert len(read) == 2
    assert [c.staged for c in run.learner.saves] == [False] * 3
    assert run.store.steps() == [3, 6, 9]


# ---- a rank's writer ---------------------------------------------------------------------------------------


class Gated:
    """A snapshot whose writing waits, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.open, self.error, self.extra = threading.Event(), error, {"version": 4}

    @classmethod
    def opened(cls) -> Gated:
        gated = cls()
        gated.open.set()
        return gated

    def write(self, folder: Path) -> list[Path]:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        (folder / "part").write_bytes(b"weights")
        return [folder / "part"]


def posted(folder: Path, snapshot: Gated, meanwhile: Callable[[list[Any]], None]) -> Any:
    """What a writer posts for a staged snapshot; `meanwhile` is called once it has returned."""
    found: list[Any] = []
    writer = Writer(found.append)
    writer.write(snapshot, m.SaveCommand(folder, staged=True))
    meanwhile(found)
    snapshot.open.set()
    writer.write(Gated.opened(), m.SaveCommand(folder, staged=False))  # waits for the one before
    return found[0]


def test_a_rank_reports_what_it_wrote_once_it_is_written(tmp_path: Path) -> None:
    def nothing_yet(found: list[Any]) -> None:
        assert not found

    saved = posted(tmp_path, Gated(), nothing_yet)
    assert (saved.extra, saved.error) == ({"version": 4}, None)
    assert saved.files == {"part": described(tmp_path / "part")}
    assert json.loads(json.dumps(saved.files)) == saved.files


def test_a_full_disk_is_no_failure_and_anything_else_is(tmp_path: Path) -> None:
    full = posted(tmp_path, Gated(OSError(errno.ENOSPC, "No space left on device")), len)
    assert full.error == FULL
    assert full.files == {}
    assert posted(tmp_path, Gated(ValueError("odd")), len) == m.Failed("worker", "ValueError: odd")
