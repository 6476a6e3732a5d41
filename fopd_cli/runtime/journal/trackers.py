"""Experiment trackers beside TensorBoard: wandb, trackio, MLflow, SwanLab. No tracker can stop a run.

Each works in its own thread, behind a queue. One that is down or not logged in is dropped with a message; one
that is slow loses records, which is reported at the end. Its own settings say where it logs to
(`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, ...); the default project is fopd.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

PROJECT = "fopd"
WAITING = 1000  # records that may wait for a tracker
PATIENCE_S = 20.0  # for waiting records, when the run has ended

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is tracked. `config` is the resolved recipe."""

    run_dir: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    def identity(self, tracker: str) -> str:
        """The same through all resumes of the run, so that its curves continue."""
        path = self.run_dir / f".track-{tracker}"
        with contextlib.suppress(FileNotFoundError):
            return path.read_text()
        made = uuid.uuid4().hex[:16]
        path.write_text(made)
        return made


class Tracker(Protocol):
    """One service. It is dropped if it raises anything."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    def __init__(self, subject: Subject) -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and wandb.api.api_key is None:
            raise RuntimeError("not logged in to wandb; run wandb login, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=subject.name,
            id=subject.identity("wandb"),
            resume="allow",
            dir=str(subject.run_dir),
            config=dict(subject.config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own steps may not go back, and a resumed run's do.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    def __init__(self, subject: Subject) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        mark = subject.identity("mlflow")
        runs = self._client.search_runs([experiment], f"tags.fopd = '{mark}'")
        if runs:
            self._id = runs[0].info.run_id
        else:
            made = self._client.create_run(experiment, run_name=subject.name, tags={"fopd": mark})
            self._id = made.info.run_id
            for key, value in flat(subject.config):
                self._client.log_param(self._id, key, str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    def __init__(self, subject: Subject) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{subject.name}-{subject.identity('trackio')[:6]}",
            resume="allow",
            config=dict(subject.config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Swanlab:
    def __init__(self, subject: Subject) -> None:
        import swanlab

        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=subject.name,
            id=subject.identity("swanlab"),
            resume="allow",
            log_dir=str(subject.run_dir / "swanlab"),
            config=dict(subject.config),
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Subject], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
    "swanlab": Swanlab,
}


class Guarded:
    """A tracker behind a thread: `log` returns at once, and no failure of the tracker reaches the caller."""

    def __init__(self, name: str, make: Callable[[], Tracker], say: Say) -> None:
        self.name, self._make, self._say = name, make, say
        self._waiting: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(WAITING)
        self._dropped = 0
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._gone.is_set():
            return
        try:
            self._waiting.put_nowait((values, step))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a while for records that are still to be sent."""
        if not self._gone.is_set():
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=PATIENCE_S)
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive():
                self._say(
                    f"track: {self.name} did not take all records within {PATIENCE_S:g} s; metrics.jsonl "
                    "has them"
                )
        if self._dropped:
            self._say(
                f"track: {self.name} was too slow: {self._dropped} records were not sent; metrics.jsonl "
                "has them"
            )

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (record := self._waiting.get()) is not None:
                tracker.log(*record)
            tracker.close()
        except BaseException as error:  # some raise SystemExit
            why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            self._say(f"track: {self.name} is dropped: {why}; the run goes on, metrics.jsonl has everything")
        finally:
            self._gone.set()


def missing(names: Sequence[str]) -> list[str]:
    """The trackers whose package is not installed."""
    return [name for name in names if name in TRACKERS and importlib.util.find_spec(name) is None]


def open_trackers(names: Sequence[str], subject: Subject, say: Say) -> list[Guarded]:
    """All trackers that a recipe names, except TensorBoard, which is a file, not a service."""
    return [Guarded(name, partial(TRACKERS[name], subject), say) for name in names if name in TRACKERS]


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `[("a.b", 1)]`."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found
