"""A version is published while the next step computes: in which order things happen, and what is in the slots
then.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from conftest import ROOT, small_recipe

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.learner.pieces import Piece
from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Publishing
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.crew.inprocess import InProcess
from fopd_cli.runtime.crew.pretend import Pretend
from fopd_cli.runtime.crew.publisher import Publisher
from fopd_cli.runtime.crew.roles import Learning
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.saving import Unsaved
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.memory.arena import aligned, targets_at
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.runtime.weights.broadcast import Broadcast
from fopd_cli.runtime.weights.ipc import Ipc
from fopd_cli.runtime.weights.transport import Outlet, Shared, Transport
from fopd_cli.samples import Sample

ALONE = WorkerSpec("learner", 0, 1, (), 1)
HERE = 120.0  # seconds after which a test that waits for another thread fails


@pytest.fixture(scope="module")
def samples(pair: Path) -> list[Sample]:
    return kit.make_samples(pair, 4)


def channel_for(learner: Publishing, dtype: torch.dtype) -> WeightChannel:
    return WeightChannel.create([(n, tuple(t.shape), dtype) for n, t in learner.publish()])


def outlet(channel: WeightChannel) -> Outlet:
    """Of a learner with one rank."""
    return Shared(channel).outlet(ALONE)


def copies(learner: Publishing, channel: WeightChannel) -> dict[str, torch.Tensor]:
    """What the learner holds now, gathered, in the slots' dtypes."""
    return {name: tensor.to(channel.dtypes[name]).clone() for name, tensor in learner.publish()}


def check(channel: WeightChannel, version: int, expected: dict[str, torch.Tensor]) -> None:
    found = dict(channel.read(version))
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    channel.check(version)


def test_forward_and_backward_go_on_beside_a_publication_and_the_update_waits_for_its_last_read(
    pair: Path, samples: list[Sample]
) -> None:
    learner, log = kit.make_learner(pair, kit.config(micro_tokens=1)), list[str]()
    channel, posted = channel_for(learner, torch.bfloat16), list[Any]()
    publisher = Publisher(outlet(channel), False, posted.append)
    learner.train(0, samples)
    expected = copies(learner, channel)
    waits, updated = threading.Event(), threading.Event()

    def until() -> None:
        assert waits.wait(HERE), "the step did not go as far as its update"
        assert not updated.wait(0.2), "weights changed while they were read"
        log.append("read")

    def before_update() -> None:
        log.append("wait")
        waits.set()
        publisher.let_update()

    def update(*_: Any) -> None:
        log.append("update")
        updated.set()

    learner.student.register_forward_hook(lambda *_: log.append("forward"))
    norm = learner.student.lm.model.norm.weight  # used once: one note a backward pass
    norm.register_post_accumulate_grad_hook(lambda _: log.append("backward"))
    learner.optimizer.register_step_pre_hook(update)
    publisher.publish(kit.Held(learner, until))
    learner.train(1, samples, before_update)
    publisher.finish()
    assert log == ["forward", "backward"] * 4 + ["wait", "read", "update"]
    check(channel, 1, expected)
    (published,) = posted
    assert (published.version, published.nbytes) == (1, sum(t.nbytes for t in expected.values()))
    assert (published.span.name, published.span.args) == ("publish", {"version": 1})


def test_the_first_micro_batch_is_sent_while_the_version_before_is_published(
    pair: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the publication has time to pack and to copy."""
    learner, sent = kit.make_learner(pair, kit.config()), threading.Event()
    publisher = Publisher(outlet(channel_for(learner, torch.float32)), False, list[Any]().append)
    send = learner.lane.send

    def noted(batch: Any) -> Any:
        sent.set()
        return send(batch)

    monkeypatch.setattr(learner.lane, "send", noted)
    publisher.publish(kit.Held(learner, lambda: assert_(sent.wait(HERE))))
    learner.train(0, samples, publisher.let_update)
    publisher.finish()


def assert_(true: bool) -> None:
    assert true


def test_a_publication_that_fails_is_said_and_holds_up_nobody(pair: Path, samples: list[Sample]) -> None:
    learner, posted = kit.make_learner(pair, kit.config()), list[Any]()
    channel = channel_for(learner, torch.float32)
    publisher = Publisher(outlet(channel), False, posted.append)
    publisher.publish(kit.Held(learner, lambda: assert_(False)))
    learner.train(0, samples, publisher.let_update)
    publisher.finish()
    assert [(type(p), p.kind) for p in posted] == [(m.Failed, "worker")]
    with pytest.raises(RuntimeError, match="version 0"):
        channel.read(0)


@pytest.mark.parametrize("by", ["broadcast", "ipc"])
def test_slots_in_the_learners_own_memory_are_written_beside_the_next_step_too(
    pair: Path, samples: list[Sample], tmp_path: Path, by: str
) -> None:
    """And the host's after them, where the conductor reads."""
    learner, said = kit.make_learner(pair, kit.config()), list[Any]()
    layout = channel_for(learner, torch.bfloat16).layout
    transport: Transport = (
        Broadcast.create(layout, tmp_path / ".rendezvous", HERE, mirrored=True)
        if by == "broadcast"
        else Ipc.create(layout, [], tmp_path / ".rendezvous", mirrored=True)
    )
    ours, begun = transport.outlet(ALONE), threading.Event()
    publisher = Publisher(ours, False, said.append)
    expected = copies(learner, ours.slots)
    learner.student.register_forward_hook(lambda *_: begun.set())
    publisher.publish(kit.Held(learner, lambda: assert_(begun.wait(HERE))))
    learner.train(0, samples, publisher.let_update)
    publisher.finish()
    assert [type(message) for message in said] == [m.Published]
    check(ours.slots, 0, expected)
    check(transport.host, 0, expected)


# ---- the learner's process ---------------------------------------------------------------------------------


class Process:
    """What a learner's process holds, and what it has said."""

    def __init__(self, pair: Path, folder: Path) -> None:
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(small_recipe(pair)))
        parsed = load_recipe(recipe, [])
        state = State(load_inputs(parsed, place(parsed, 0)))
        self.said: list[Any] = []
        self.setup = state.inputs.setup(state.buffer.arena.memory, folder)
        self.role = Learning(ALONE, self.setup, lambda: None, self.said.append)

    def train(self, step: int, samples: list[Sample]) -> None:
        offset, regions = 0, []
        spec = self.setup.target_specs[0]
        for sample in samples:
            positions = sample.rollout.response_length
            held = targets_at(self.setup.arena, offset, spec, positions)
            assert held.hidden is not None
            assert sample.targets.hidden is not None
            held.hidden.copy_(sample.targets.hidden)
            regions.append(m.Region(offset, positions))
            offset += aligned(spec.nbytes(positions))
        lags = [sample.lag for sample in samples]
        assert self.role.do(m.TrainCommand(step, [s.rollout for s in samples], regions, lags)) is None


def test_a_step_is_reported_before_its_version_and_that_before_the_next_step(
    pair: Path, samples: list[Sample], tmp_path: Path
) -> None:
    learner = Process(pair, tmp_path)
    for step in range(3):
        learner.train(step, samples)
    learner.role.publisher.finish()
    assert [type(message) for message in learner.said] == [m.Trained, m.Published] * 3
    assert [p.version for p in learner.said[1::2]] == [1, 2, 3]
    assert [(t.report.step, t.span.name) for t in learner.said[::2]] == [(s, "train") for s in range(3)]
    check(learner.setup.weights.host, 3, copies(learner.role.engine, learner.setup.weights.host))


def test_a_learner_goes_to_sleep_when_its_version_is_published(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights move to other memory then."""
    learner, log = Process(pair, tmp_path), list[str]()
    engine: Any = learner.role.engine

    def until() -> None:
        time.sleep(0.2)
        log.append("read")

    monkeypatch.setattr(engine, "sleep", lambda: log.append("sleep"))
    learner.role.publisher.publish(kit.Held(engine, until))
    assert isinstance(learner.role.do(m.SleepCommand()), m.Asleep)
    assert log == ["read", "sleep"]
    assert [type(message) for message in learner.said] == [m.Published]


# ---- what the conductor records ----------------------------------------------------------------------------


class Measured(Pretend):
    """Publications whose seconds and kilobytes are the version."""

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        answers = super().do(engine, command)
        if not isinstance(command, m.TrainCommand):
            return answers
        version = command.step + 1
        return [answers[0], m.Published(version, 1000 * version, m.Span("publish", 0.0, float(version)))]


class SlowToPublish:
    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> list[float]:
        return [now + 1.0 + 0.9 * isinstance(answer, m.Published) for answer in answers]

    def stopped(self, now: float, engine: Engine) -> None: ...


@pytest.mark.parametrize("lag", [0, 2])
def test_a_steps_line_has_its_own_publication_and_stands_before_what_came_of_the_step(lag: int) -> None:
    small = ["learner.steps=6", "learner.batch_samples=8", "task.eval_prompts=8", f"schedule.max_lag={lag}"]
    refreshing = ["freshness.policy=fixed_refresh", "freshness.refresh.every=2", "freshness.max_drift=null"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*small, *refreshing])
    state, records = State(load_inputs(recipe, place(recipe, 0))), Recorded()
    crew = InProcess(Measured(), SlowToPublish())
    with Journal(recipe, state.inputs.tokenizer, lambda *_: records, quiet=True) as journal:
        Conductor(state, crew, journal, Unsaved(), Signals(journal.say)).run()
    steps = records.metrics.kind("step")
    assert [r["step"] for r in steps] == list(range(1, 7))
    keys = ("publish_bytes", "publish_seconds", "publish_gb_per_s")
    for t, line in enumerate(steps, 1):
        assert [line["timing"][key] for key in keys] == [1000 * t, t, pytest.approx(1e-6)]
    refreshes = [i for i, r in enumerate(records.metrics) if r["kind"] == "refresh"]
    before = [records.metrics[i - 1] for i in refreshes]
    assert [(r["kind"], r["step"]) for r in before] == [("step", 2), ("step", 4)]


# ---- several ranks -----------------------------------------------------------------------------------------


def make_lora_learner(pair: Path, alone: bool, rank: int, world: int) -> FsdpLearner:
    """`alone`: the adapters are published without their base."""
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    lora.add_adapters(model, 3, 6.0, "all-linear", 0, torch.float32)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    return FsdpLearner(model, [head], kit.config(adapter_only=alone), kit.CPU, rank, world)


@dataclass
class Overlapped:
    """Three steps, each beside the publication before."""

    wrong: list[str]  # names of published weights that are not those gathered at the time
    said: list[m.Published]
    nbytes: int  # of all weights
    by_parts: bool


def overlapped(learner: FsdpLearner, samples: list[Sample], folder: Path) -> Overlapped:
    world, rank = learner.world, learner.rank
    layout = [(n, tuple(t.shape), torch.bfloat16) for n, t in learner.publish()]
    channel, said = shared_by_all(folder, layout, world), list[Any]()
    outlet = Shared(channel).outlet(WorkerSpec("learner", rank, world, (), 1))
    publisher = Publisher(outlet, False, said.append)
    wrong, expected = list[str](), dict[str, torch.Tensor]()
    for step in range(3):
        learner.train(step, samples, publisher.let_update)
        publisher.finish()
        torch.distributed.barrier()
        if step:
            published = dict(channel.read(step))
            wrong += [n for n, t in expected.items() if not torch.equal(t, published[n])]
        expected = copies(learner, channel)
        torch.distributed.barrier()
        publisher.publish(learner)
    publisher.finish()
    return Overlapped(wrong, said, sum(t.nbytes for t in expected.values()), learner.pieces() is not None)


def shared_by_all(folder: Path, layout: Any, ranks: int) -> WeightChannel:
    """The same slots in all ranks, as those in the conductor's memory are."""
    folder.mkdir(exist_ok=True)
    size = 2 * WeightChannel(layout, torch.empty(0), torch.empty(0)).slot_bytes
    memory = torch.from_file(str(folder / "slots"), shared=True, size=size, dtype=torch.uint8)
    stamps = torch.from_file(str(folder / "stamps"), shared=True, size=4 * ranks, dtype=torch.int64)
    return WeightChannel(layout, memory, stamps.view(2, ranks, 2))


def rank_overlapped(rank: int, world: int, pair: Path, samples: list[Sample], folder: Path) -> Any:
    learners = {
        "all": kit.make_learner(pair, kit.config(), rank, world),
        "merged": make_lora_learner(pair, False, rank, world),
        "adapters": make_lora_learner(pair, True, rank, world),
    }
    return {name: overlapped(one, samples, folder / name) for name, one in learners.items()}


def test_every_rank_writes_its_shards_and_together_they_are_the_weights_of_that_version(
    pair: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Two do not divide adapters of rank 3. What is merged is written by the first."""
    for name, found in kit.on_ranks(2, tmp_path, rank_overlapped, pair, samples, tmp_path).items():
        assert found.wrong == [], name
        assert [p.version for p in found.said] == [1, 2, 3]
        assert found.by_parts == (name != "merged")
        written = 1 if name == "merged" else 1 / 2
        assert found.said[0].nbytes == pytest.approx(written * found.nbytes, rel=0.2), name


# ---- death -------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """Two weights of the version's number; the process is killed between them."""

    version: int
    killed: bool

    def publish(self, dtypes: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("there are pieces")

    def pieces(self) -> Sequence[Piece]:
        return [Piece("a", 0, lambda: torch.full((6,), float(self.version))), Piece("b", 0, self._second)]

    def _second(self) -> torch.Tensor:
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.full((4,), float(self.version))


def publish_and_die(channel: WeightChannel) -> None:
    publisher = Publisher(outlet(channel), False, list[Any]().append)
    for version in (1, 2, 3):
        publisher.publish(Weights(version, killed=version == 3))
    publisher.finish()


def test_a_learner_that_dies_in_the_middle_of_a_publication_leaves_the_version_before() -> None:
    channel = WeightChannel.create([("a", (2, 3), torch.float32), ("b", (4,), torch.float32)])
    process = mp.get_context("fork").Process(target=publish_and_die, args=(channel,))
    process.start()
    process.join(HERE)
    assert process.exitcode == -signal.SIGKILL
    assert all(bool((tensor == 2).all()) for _, tensor in channel.read(2))
    for version in (1, 3):
        with pytest.raises(RuntimeError, match=rf"version {version} .*stamps \[3, 1\]"):
            channel.read(version)


def test_a_version_is_there_when_all_ranks_have_written_their_part() -> None:
    channel = WeightChannel.create([("a", (2, 3), torch.float32)], ranks=2)
    with channel.writing(4, rank=0) as slot:
        next(iter(slot))[1].fill_(4.0)
    with pytest.raises(RuntimeError, match="version 4"):
        channel.read(4)
    with channel.writing(4, rank=1):
        pass
    assert bool((dict(channel.read(4))["a"] == 4).all())
