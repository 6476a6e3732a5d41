"""What a run writes for people: complete at any moment, and the same after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, full_at

from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.board import Board
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.sinks import JsonLines, Resume, Telemetry
from fopd_cli.runtime.journal.trace import Trace


def test_the_timeline_is_a_json_list_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path)
    assert json.loads(path.read_text()) == []
    for i in range(3):
        trace.add("sampler-0", Span("generate", 10.0 + i, 10.5 + i, {"text": "ü ⟦a⟧"}))
        events = json.loads(path.read_text())  # nothing was closed or flushed
        assert [e["ts"] for e in events if e["ph"] == "X"] == [round((10.0 + j) * 1e6) for j in range(i + 1)]
    assert events[-1]["dur"] == 500_000


def test_a_run_that_goes_on_keeps_every_worker_in_its_track(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    first = Trace(path)
    first.add("sampler-0", Span("generate", 1.0, 2.0))
    first.add("learner-0", Span("train", 2.0, 3.0))
    first.close()
    again = Trace(path)
    again.add("learner-0", Span("train", 5.0, 6.0))  # the other one comes first this time
    again.add("teacher-0", Span("score", 6.0, 7.0))
    events = json.loads(path.read_text())
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["learner-0", "sampler-0", "teacher-0"]
    work = [(names[e["tid"]], e["ts"]) for e in events if e["ph"] == "X"]
    assert work == [("sampler-0", 1e6), ("learner-0", 2e6), ("learner-0", 5e6), ("teacher-0", 6e6)]


def test_a_timeline_that_was_cut_short_is_put_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path)
    for i in range(3):
        trace.add("sampler-0", Span("generate", float(i), i + 0.5))
    trace.close()
    path.write_text(path.read_text()[:-20])  # as a kill in the middle of a write does
    Trace(path).add("sampler-0", Span("generate", 9.0, 9.5))
    assert [e["ts"] for e in json.loads(path.read_text()) if e["ph"] == "X"] == [0, 1e6, 9e6]


def test_warnings_are_said_and_kept_and_those_that_are_redone_put_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [])
    with Journal(recipe, None, lambda resume, changed: Telemetry(tmp_path, resume, print)) as journal:
        journal.begin()
        journal.warn(2, "the KL climbs")
        journal.warn(7, "it still climbs")
    assert "step 7: it still climbs" in capsys.readouterr().err
    Telemetry(tmp_path, Resume(5, frozenset()), print).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()] == [
        2
    ]
    aside = (tmp_path / "warnings.superseded.jsonl").read_text()
    assert json.loads(aside) == {"step": 7, "text": "it still climbs"}


def test_json_has_no_nan(tmp_path: Path) -> None:
    records = JsonLines(tmp_path / "metrics.jsonl", None)
    records.write({"step": 1, "score": float("nan"), "of": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "score": None,
        "of": [None, 1.5],
    }


TIMING = {
    "seconds": 2.5,
    "gap_seconds": 0.75,
    "buffer_samples": 8,
    "buffer_bytes": 4096,
    "in_flight": 3,
    "publish_seconds": 0.25,
    "publish_gb_per_s": 1.5,
    "busy": {"learner": 0.25},
}
ON_DEVICES = {
    "mfu": {"learner": 0.375, "teacher": 0.5},
    "device_bytes": {"learner-0": {"allocated": 7 * 10**9, "reserved": 9 * 10**9}},
}


def test_what_a_step_took_of_its_devices_is_on_the_board(tmp_path: Path) -> None:
    """Read back from the event files; of a run on a CPU only what it has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    telemetry = Telemetry(tmp_path, None, print)
    for step, timing in enumerate((TIMING, TIMING | ON_DEVICES), 1):
        record = {"step": step, "loss": 0.5, "kl_by_quartile": [0.125, 0.25, 0.5, 1.0]}
        telemetry.scalars(records.scalars(record, timing), step)
    telemetry.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    found = {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    assert found["runtime/gap_seconds"] == {1: 0.75, 2: 0.75}
    assert found["idle/learner"] == {1: 0.75, 2: 0.75}
    assert found["mfu/learner"] == {2: 0.375}
    assert found["mfu/teacher"] == {2: 0.5}
    assert found["device_gb/learner-0 allocated"] == {2: 7.0}
    assert found["device_gb/learner-0 reserved"] == {2: 9.0}
    assert found["train/kl_quarter_4"] == {1: 1.0, 2: 1.0}


def test_a_full_disk_ends_no_run_and_loses_no_record(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    telemetry = Telemetry(tmp_path, None, said.append)

    def step(number: int) -> None:
        for sink in (telemetry.metrics, telemetry.ledger, telemetry.samples, telemetry.warnings):
            sink.write({"step": number, "text": "x" * 100})
        telemetry.scalars({"train/loss": float(number)}, number)
        telemetry.histograms({"lag": np.arange(9.0)}, number)
        telemetry.span("sampler-0", Span("generate", float(number), number + 0.5))

    step(1)
    telemetry.flush()
    with full_at(300):
        for number in range(2, 9):
            step(number)
            json.loads((tmp_path / "trace.json").read_text())
            for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
                json.loads(line)
        assert len(said) == 1, "not once a record"
        assert "records wait in memory until the disk takes them" in said[0]
        with pytest.raises(OSError, match="File too large"):
            telemetry.flush()  # so that no checkpoint is written
    step(9)
    assert said[1:] == ["the disk takes records again; none is lost"]
    telemetry.flush()
    telemetry.close()
    for name in ("metrics", "ledger", "samples", "warnings"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [e["ts"] for e in events if e["ph"] == "X"] == [i * 1e6 for i in range(1, 10)]
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(i, i) for i in range(1, 10)]
    assert [e.step for e in board.Histograms("lag")] == list(range(1, 10))
    assert len(said) == 2


def test_a_run_that_ends_on_a_full_disk_says_what_is_lost(tmp_path: Path) -> None:
    said: list[str] = []
    telemetry = Telemetry(tmp_path, None, said.append, board=False)
    with full_at(10):
        telemetry.metrics.write({"step": 1, "kind": "train"})
        telemetry.close()
    assert "records wait in memory" in said[0]
    assert said[1] == f"{tmp_path}/metrics.jsonl: the disk does not take its last 1 records"


def test_the_board_has_what_summary_writer_writes(tmp_path: Path) -> None:
    """Values, histograms, and what a resumed run takes back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    values = np.random.default_rng(0).normal(size=1000)
    theirs = SummaryWriter(str(tmp_path / "theirs"), purge_step=None)
    ours = Board(tmp_path / "ours", None)
    for step in range(5):
        theirs.add_scalar("loss", 0.1 * step, step)
        ours.scalar("loss", 0.1 * step, step)
        theirs.add_histogram("drift", values * step, step)
        ours.histogram("drift", values * step, step)
    theirs.close()
    ours.file.close()
    again = SummaryWriter(str(tmp_path / "theirs"), purge_step=3, filename_suffix="again")
    again.add_scalar("loss", -1.0, 3)
    again.close()
    resumed = Board(tmp_path / "ours", 3)
    resumed.scalar("loss", -1.0, 3)
    boards = {}
    for name in ("theirs", "ours"):
        boards[name] = EventAccumulator(str(tmp_path / name), size_guidance={"histograms": 0})
        boards[name].Reload()
    scalars = {name: [(e.step, e.value) for e in board.Scalars("loss")] for name, board in boards.items()}
    assert scalars["ours"] == scalars["theirs"]
    assert [step for step, _ in scalars["ours"]] == [0, 1, 2, 3]
    pairs = list(zip(*(board.Histograms("drift") for board in boards.values()), strict=True))
    assert [(a.step, b.step) for a, b in pairs] == [(0, 0), (1, 1), (2, 2)]
    for one, other in ((a.histogram_value, b.histogram_value) for a, b in pairs):
        assert one.bucket == other.bucket
        assert one.bucket_limit == pytest.approx(other.bucket_limit, rel=1e-12)
        assert replace(one, bucket_limit=[]) == replace(other, bucket_limit=[])
