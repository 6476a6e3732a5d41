"""Real trackers, offline; those that are down, slow, or raise stop nothing."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import wait_for

from fopd_cli.runtime.journal import trackers
from fopd_cli.runtime.journal.trackers import Guarded, Subject, Tracker, flat, missing, open_trackers

CONFIG = {"learner": {"lr": 1e-4, "steps": 3}, "seed": 0}


class Kept:
    """A tracker that keeps what it receives, once `go` is set."""

    def __init__(self, go: threading.Event) -> None:
        self.seen: list[tuple[Mapping[str, float], int]] = []
        self.closed, self.go = False, go

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.go.wait(30)
        self.seen.append((values, step))

    def close(self) -> None:
        self.closed = True


def test_records_arrive_in_order() -> None:
    said: list[str] = []
    kept = Kept(threading.Event())
    kept.go.set()
    guarded = Guarded("kept", lambda: kept, said.append)
    for step in range(5):
        guarded.log({"kl": 1.0 / (step + 1)}, step)
    guarded.close()
    assert [step for _, step in kept.seen] == [0, 1, 2, 3, 4]
    assert kept.closed
    assert said == []


@pytest.mark.parametrize("error", [RuntimeError("no login\nand more"), OSError("down"), SystemExit(1)])
def test_one_that_cannot_start_is_dropped_with_one_line(error: BaseException) -> None:
    said: list[str] = []

    def make() -> Tracker:
        raise error

    guarded = Guarded("broken", make, said.append)
    for step in range(3):
        guarded.log({"kl": 1.0}, step)
    guarded.close()
    (line,) = said
    assert line.startswith("track: broken is dropped: ")
    assert "and more" not in line


def test_one_that_is_slow_loses_records_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING", 10)
    said: list[str] = []
    kept = Kept(threading.Event())
    guarded = Guarded("slow", lambda: kept, said.append)
    for step in range(50):
        guarded.log({"kl": 1.0}, step)
    kept.go.set()
    guarded.close()
    assert 10 <= len(kept.seen) <= 12
    assert said == [
        f"track: slow was too slow: {50 - len(kept.seen)} records were not sent; metrics.jsonl has them"
    ]


def test_mlflow_keeps_a_run_through_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    said: list[str] = []
    for steps in ((1, 2), (2, 3)):
        (tracker,) = open_trackers(["tensorboard", "mlflow"], Subject(tmp_path, CONFIG), said.append)
        for step in steps:
            tracker.log({"kl": 1.0 / step}, step)
        tracker.close()
    assert said == []
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fopd").experiment_id])
    assert run.data.params["learner.lr"] == "0.0001"
    history = client.get_metric_history(run.info.run_id, "kl")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]


def test_wandb_offline_and_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    said: list[str] = []
    (tracker,) = open_trackers(["wandb"], Subject(tmp_path, CONFIG), said.append)
    tracker.log({"kl": 0.25}, 7)
    tracker.close()
    assert said == []
    (file,) = tmp_path.glob("*wandb/offline-run-*/run-*.wandb")
    wait_for(lambda: b"0.25" in file.read_bytes(), "wandb's own process to write the file")
    assert b"kl" in file.read_bytes()
    monkeypatch.setenv("WANDB_MODE", "online")
    (tracker,) = open_trackers(["wandb"], Subject(tmp_path, CONFIG), said.append)
    tracker.close()
    assert said == [
        "track: wandb is dropped: not logged in to wandb; run wandb login, or set WANDB_MODE=offline; "
        "the run goes on, metrics.jsonl has everything"
    ]


def test_packages_that_are_not_there() -> None:
    assert missing(["tensorboard", "wandb"]) in ([], ["wandb"])
    assert flat({"a": {"b": 1}, "c": [2]}) == [("a.b", 1), ("c", [2])]
