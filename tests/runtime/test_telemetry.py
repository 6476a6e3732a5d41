"""What a run writes for people: complete at any moment, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal import records
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
    path.write_text(path.read_text()[:-20])  # as a full disk does
    Trace(path).add("sampler-0", Span("generate", 9.0, 9.5))
    assert [e["ts"] for e in json.loads(path.read_text()) if e["ph"] == "X"] == [0, 1e6, 9e6]


def test_warnings_are_said_and_kept_and_those_that_are_redone_put_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [])
    with Journal(recipe, None, lambda resume, changed: Telemetry(tmp_path, resume)) as journal:
        journal.begin()
        journal.warn(2, "the KL climbs")
        journal.warn(7, "it still climbs")
    assert "step 7: it still climbs" in capsys.readouterr().err
    Telemetry(tmp_path, Resume(5, frozenset())).close()
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

    telemetry = Telemetry(tmp_path, None)
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
