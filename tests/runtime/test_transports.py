"""How weights get from the learner to the samplers: every transport carries the same bits, all or nothing,
and none lets anybody hang on a process that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
import torch
import transport_kit as kit
import yaml
from conftest import SLOW, small_recipe
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime import placing
from fopd_cli.runtime.crew.fleet import Fleet, WorkerSpec
from fopd_cli.runtime.crew.messages import Lost
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.memory.weights import Layout, WeightChannel, layout_bytes
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.weights.broadcast import Broadcast, Hello, buckets
from fopd_cli.runtime.weights.choice import chosen, conductor_reads, host_bytes
from fopd_cli.runtime.weights.ipc import Ipc
from fopd_cli.runtime.weights.transport import Inlet, Shared, Transport

LAYOUT: Layout = [
    ("embedding", (50, 40), torch.bfloat16),
    ("bias", (3,), torch.float32),
    ("empty", (0, 4), torch.bfloat16),
    ("matrix", (40, 70), torch.bfloat16),
    ("norm", (40,), torch.float32),
]
LEARNER, SAMPLER = WorkerSpec("learner", 0, 1, (), 1), WorkerSpec("sampler", 0, 1, (), 1)
TRANSPORTS = ("shared", "broadcast", "ipc")


def transport(name: str, folder: Path, mirrored: bool = False, timeout_s: float = 60.0) -> Transport:
    rendezvous = folder / f".rendezvous-{name}"
    match name:
        case "broadcast":
            return Broadcast.create(LAYOUT, rendezvous, timeout_s, mirrored, bucket=2048)
        case "ipc":
            return Ipc.create(LAYOUT, (), rendezvous, mirrored)
        case _:
            return Shared(WeightChannel.create(LAYOUT))


def weights(version: int) -> Iterator[tuple[str, Tensor]]:
    """In fp32, as a learner has them."""
    generator = torch.Generator().manual_seed(version)
    for name, shape, _ in LAYOUT:
        yield name, torch.randn(shape, generator=generator)


def expected(version: int) -> dict[str, Tensor]:
    return {n: t.to(dtype) for (n, t), (_, _, dtype) in zip(weights(version), LAYOUT, strict=True)}


def loaded(inlet: Inlet, version: int) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in inlet.read(version)}
    inlet.check(version)
    return found


def same(found: dict[str, Tensor], version: int) -> bool:
    wanted = expected(version)
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()
    )


# ---- in one process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSPORTS)
def test_two_versions_are_there_and_no_third(tmp_path: Path, name: str) -> None:
    made = transport(name, tmp_path)
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    assert inlet.slot_bytes == layout_bytes(LAYOUT)
    for version in (0, 1):
        assert outlet.write(version, weights(version)) == sum(t.nbytes for t in expected(0).values())
    assert all(same(loaded(inlet, version), version) for version in (1, 0, 1))
    outlet.write(2, weights(2))
    assert same(loaded(inlet, 2), 2)
    assert same(loaded(inlet, 1), 1)
    with pytest.raises(RuntimeError, match=r"version 0 .*stamps \[2, 2\]"):
        list(inlet.read(0))
    assert same(loaded(inlet, 1), 1), "a refused version costs nothing"


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_version_that_is_overwritten_while_it_is_read_raises(tmp_path: Path, name: str) -> None:
    made = transport(name, tmp_path)
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    outlet.write(0, weights(0))
    arriving = iter(inlet.read(0))
    next(arriving)
    outlet.write(2, weights(2))
    list(arriving)
    with pytest.raises(RuntimeError, match="overwritten"):
        inlet.check(0)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_version_that_lacks_a_weight_is_not_there(tmp_path: Path, name: str) -> None:
    made = transport(name, tmp_path)
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    with pytest.raises(RuntimeError, match="lacks the weights"):
        outlet.write(0, iter(list(weights(0))[:-1]))
    with pytest.raises(RuntimeError, match="version 0"):
        list(inlet.read(0))


@pytest.mark.parametrize("name", ["broadcast", "ipc"])
def test_what_the_conductor_reads_is_in_the_hosts_slots_too(tmp_path: Path, name: str) -> None:
    """And the version that a resumed run begins with gets from there to the samplers."""
    made = transport(name, tmp_path, mirrored=True)
    made.host.write(4, weights(4))
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    outlet.write(5, weights(5))
    assert same(dict(made.host.read(5)), 5)
    assert same(loaded(inlet, 4), 4)
    assert same(loaded(inlet, 5), 5)
    assert transport(name, tmp_path).host.memory.nbytes == 0, "nothing is reserved where it does not read"


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_rank_that_only_takes_part_in_gathering_keeps_nothing(tmp_path: Path, name: str) -> None:
    made = transport(name, tmp_path)
    outlet = made.outlet(replace(LEARNER, rank=1, world=2))
    assert outlet.write(0, weights(0)) == 0
    with pytest.raises(RuntimeError, match="version 0"):
        made.inlet(SAMPLER, True).check(0)


def test_a_replica_that_gives_up_midway_leaves_the_others_and_its_successor_alone(tmp_path: Path) -> None:
    made = transport("broadcast", tmp_path)
    outlet, other = made.outlet(LEARNER), made.inlet(replace(SAMPLER, rank=1, world=2), True)
    outlet.write(0, weights(0))
    assert same(loaded(other, 0), 0)
    arriving = iter(made.inlet(SAMPLER, True).read(0))
    next(arriving)
    assert isinstance(arriving, Generator)
    arriving.close()
    assert same(loaded(other, 0), 0)
    with pytest.raises(RuntimeError, match="sends no more weights"):
        list(made.inlet(SAMPLER, True).read(0))
    assert same(loaded(made.inlet(replace(SAMPLER, restarts=1), True), 0), 0)


def test_processes_that_are_not_ours_get_nothing(tmp_path: Path) -> None:
    made = transport("broadcast", tmp_path)
    assert isinstance(made, Broadcast)
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    outlet.write(0, weights(0))
    with pytest.raises(AuthenticationError):
        Client(made.meeting.address, "AF_UNIX", authkey=b"guessed")
    Client(made.meeting.address, "AF_UNIX", authkey=made.meeting.key).close()  # dies before it has spoken
    assert same(loaded(inlet, 0), 0)


@SLOW
def test_a_process_that_stalls_holds_up_nobody_and_is_given_up(tmp_path: Path) -> None:
    """It says who it is and never joins the group, as one that is stopped."""
    made = transport("broadcast", tmp_path, timeout_s=8.0)
    assert isinstance(made, Broadcast)
    outlet, inlet = made.outlet(LEARNER), made.inlet(SAMPLER, True)
    outlet.write(0, weights(0))
    stalled = Client(made.meeting.address, "AF_UNIX", authkey=made.meeting.key)
    stalled.send(Hello("sampler-1", 0, 0, 1))
    assert same(loaded(inlet, 0), 0)
    assert stalled.poll(60)
    stalled.recv()  # where the group meets
    assert stalled.poll(60), "the learner hangs up"
    with pytest.raises(EOFError):
        stalled.recv()
    assert same(loaded(inlet, 0), 0)


SHAPES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=20)


@given(SHAPES, st.integers(1, 4000))
def test_buckets_are_whole_tensors_in_a_row(shapes: list[tuple[int, int]], size: int) -> None:
    layout: Layout = [(str(i), shape, torch.bfloat16) for i, shape in enumerate(shapes)]
    found = buckets(layout, size)
    assert [tensor for bucket in found for tensor in bucket.layout] == layout
    assert [bucket.start for bucket in found] == [sum(p.nbytes for p in found[:i]) for i in range(len(found))]
    assert all(layout_bytes(bucket.layout[:-1]) < size for bucket in found), "none is larger than it must be"
    assert all(bucket.nbytes >= size for bucket in found[:-1])


# ---- what fits ---------------------------------------------------------------------------------------------

FITS = [
    ("auto", "cpu", 0, "shared"),
    ("auto", "partition", 8, "shared"),
    ("broadcast", "auto", 0, "broadcast"),
    ("broadcast", "auto", 8, "broadcast"),
    ("broadcast", "auto", 2, "time-slicing it sleeps"),  # nothing is known to fit: roles take turns
    ("ipc", "auto", 0, "samplers run on the CPU here"),
    ("ipc", "auto", 8, "cuda:0 has none"),
    ("ipc", "partition", 8, "excludes; set transport: broadcast"),
    ("broadcast", "colocate", 2, "colocate they share them"),
    ("ipc", "timeslice", 1, "set transport: shared"),
]


@pytest.mark.parametrize(("wanted", "mode", "devices", "outcome"), FITS)
def test_a_recipe_gets_the_transport_that_it_names_or_is_told_why_not(
    tmp_path: Path, wanted: str, mode: str, devices: int, outcome: str
) -> None:
    try:
        recipe = load(tmp_path, f"placement.transport={wanted}", f"placement.mode={mode}")
        found: str = chosen(recipe, place(recipe, devices, cores=8))
    except UserError as error:
        found = str(error)
        assert "placement.transport" in found
    assert outcome in found


@pytest.mark.parametrize(("devices", "outcome"), [((0,), "ipc"), ((1,), "cuda:1 has none")])
def test_ipc_needs_a_learner_on_each_device_of_a_sampler(
    tmp_path: Path, devices: tuple[int, ...], outcome: str
) -> None:
    recipe = load(tmp_path, "placement.transport=ipc")
    plan = place(load(tmp_path), 1, cores=8)
    plan = replace(plan, mode="colocate", samplers=(replace(plan.samplers[0], devices=devices),))
    try:
        found: str = chosen(recipe, plan)
    except UserError as error:
        found = str(error)
    assert outcome in found


@pytest.mark.parametrize(
    ("override", "reads"), [("seed=1", False), ("schedule.lag=2", True), ("eval.keep_best=kl", True)]
)
def test_it_is_known_whether_the_conductor_reads_weights(tmp_path: Path, override: str, reads: bool) -> None:
    assert conductor_reads(load(tmp_path, override, "eval.every=1")) is reads


@pytest.mark.parametrize(
    ("wanted", "learners", "sampler", "host"),
    [("shared", (0, 0), 0, 2), ("broadcast", (2, 0), 1, 0), ("ipc", (2, 2), 0, 0)],
)
def test_memory_is_counted_where_the_versions_are(
    pair: Path, tmp_path: Path, wanted: str, learners: tuple[int, int], sampler: int, host: int
) -> None:
    """In versions; a small one arrives in a single bucket."""
    plain = load_recipe(load_path(tmp_path, pair))
    recipe = load_recipe(load_path(tmp_path, pair), [f"placement.transport={wanted}"])
    layout = kit.layout(pair, torch.float32)
    version, models = layout_size(layout), placing.models(plain)

    def grown(parts: Callable[[Recipe], memory.Parts]) -> float:
        return (memory.total(parts(recipe)) - memory.total(parts(plain))) / version

    ranks = [WorkerSpec("learner", rank, 2, (), 1) for rank in range(2)]
    found = [grown(lambda r, spec=spec: memory.of_learner(r, spec, models).always) for spec in ranks]
    assert found == pytest.approx(learners)
    assert grown(lambda r: memory.of_sampler(r, SAMPLER, models, 0).phases["update"]) == sampler
    assert host_bytes(recipe, layout) == host * layout_bytes(layout)


def load(folder: Path, *overrides: str) -> Any:
    return load_recipe(load_path(folder, folder), list(overrides))


def load_path(folder: Path, pair: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe(pair)))
    return path


# ---- between processes -------------------------------------------------------------------------------------


@SLOW
def test_two_learner_ranks_and_two_samplers_and_one_dies_midway(pair: Path, tmp_path: Path) -> None:
    """Sharded ranks gather, both samplers end up with the bits that shared memory gives them. One of them is
    killed between two buckets: the other one and the learner go on, and a process in its place gets all.
    """
    layout = kit.layout(pair, torch.bfloat16)
    transports: dict[str, Transport] = {
        "shared": Shared(WeightChannel.create(layout)),
        "broadcast": Broadcast.create(layout, tmp_path / ".rendezvous-b", 300.0, False, bucket=1 << 14),
    }
    ranks = [WorkerSpec("learner", rank, 2, (), 1) for rank in range(2)]
    samplers = [WorkerSpec("sampler", rank, 2, (), 1) for rank in range(2)]
    names = [spec.name for spec in samplers]
    with Fleet(tmp_path, 300, 300) as fleet:
        for spec in ranks:
            fleet.start(spec, kit.learner, transports, pair, tmp_path / "ranks")
        for spec in samplers:
            fleet.start(spec, kit.sampler, transports, pair, replaceable=True)
        learners = [spec.name for spec in ranks]
        kit.answers(fleet, [*learners, *names])
        digests = set()
        for version in (0, 1):
            for by in transports:
                written = kit.ask(fleet, learners, kit.Publish(by))
                assert [nbytes for _, nbytes in written.values()] == [layout_size(layout), 0]
            held = [kit.ask(fleet, names, kit.LoadBy(by, version)) for by in transports]
            assert len({h.digest for found in held for h in found.values()}) == 1
            digests.add(held[0][names[0]].digest)
            kit.ask(fleet, learners, kit.Learn(version))
        assert len(digests) == 2, "the step has changed the weights"

        lost = kit.ask(fleet, names[:1], kit.LoadBy("broadcast", 1, dies=5))
        assert isinstance(lost[names[0]], Lost)
        kit.ask(fleet, learners, kit.Publish("broadcast"))  # version 2
        left = kit.ask(fleet, names[1:], kit.LoadBy("broadcast", 2))
        fleet.start(replace(samplers[0], restarts=1), kit.sampler, transports, pair, replaceable=True)
        kit.answers(fleet, names[:1])
        again = kit.ask(fleet, names[:1], kit.LoadBy("broadcast", 2))
        assert again[names[0]].digest == left[names[1]].digest not in digests


def layout_size(layout: Layout) -> int:
    """Bytes of the tensors alone."""
    return sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for _, shape, dtype in layout)
