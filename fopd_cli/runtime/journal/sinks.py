"""What a run leaves for people to look at. All files are append-only and survive a crash. While the disk is
full, the run goes on and its records wait in memory (`files.Appender`).

metrics.jsonl   one record per step, evaluation and refresh; what depends on the clock is under "timing"
ledger.jsonl    the accounting, by sample id: what each step trained and gated, and what a refresh dropped
samples.jsonl   a few rollouts as text
warnings.jsonl  what the run warned about, by step
trace.json      a timeline for Perfetto or chrome://tracing, one track per worker
tensorboard/    scalars and histograms
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fopd_cli.files import Appender, Refused, write_synced
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal.trace import Trace
from fopd_cli.runtime.journal.trackers import Say, Tracker

if TYPE_CHECKING:
    from fopd_cli.runtime.journal.board import Board

BUSY = ("generate", "score", "train", "measure", "grade")


@dataclass(frozen=True)
class Resume:
    """Where a resumed run starts: the step, and the versions whose evaluation is complete."""

    step: int
    evaluated: frozenset[int]


Changes = Mapping[str, tuple[Any, Any]]  # key of the recipe -> value before, value since


class JsonLines:
    """An append-only file of records; on resume, records of what will be redone are moved aside, not lost."""

    def __init__(self, path: Path, resume: Resume | None, refused: Refused | None = None) -> None:
        """`refused`: see `Appender`. Raises `OSError`."""
        self.path = path
        if resume is not None and path.exists():
            self._rewind(resume)
        self.file = Appender(path, refused=refused)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(f"{json.dumps(_finite(record), allow_nan=False)}\n".encode())

    def close(self) -> None:
        self.file.close()

    def _rewind(self, resume: Resume) -> None:
        kept: list[str] = []
        redone: list[str] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                again = record["step"] > resume.step
            except (ValueError, KeyError):
                continue  # a line cut short by the crash
            if record.get("kind") == "eval" and record["step"] not in resume.evaluated:
                again = True  # a checkpoint is written before the evaluation of the same step
            (redone if again else kept).append(line)
        if redone:
            with self.path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as aside:
                aside.write("".join(line + "\n" for line in redone))
        write_synced(self.path, "".join(line + "\n" for line in kept))


class Sink(Protocol):
    """Records of one kind."""

    def write(self, record: dict[str, Any]) -> None: ...


class Sinks(Protocol):
    """Where a journal's records go."""

    @property
    def metrics(self) -> Sink: ...

    @property
    def ledger(self) -> Sink: ...

    @property
    def samples(self) -> Sink: ...

    @property
    def warnings(self) -> Sink: ...

    def span(self, worker: str, span: Span) -> None: ...

    def busy_shares(self) -> dict[str, float]: ...

    def busy_shares_total(self) -> dict[str, float]: ...

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None: ...

    def flush(self) -> None:
        """Write the records that wait for room on the disk. Raises `OSError`."""

    def close(self) -> None: ...


class Recorded:
    """Keeps records in memory, for studies and tests. What depends on the clock is left out."""

    def __init__(self) -> None:
        self.metrics, self.ledger, self.samples, self.warnings = Records(), Records(), Records(), Records()

    def span(self, worker: str, span: Span) -> None: ...

    def busy_shares(self) -> dict[str, float]:
        return {}

    def busy_shares_total(self) -> dict[str, float]:
        return {}

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Records(list[dict[str, Any]]):
    """Records of one kind, as they were written."""

    def write(self, record: dict[str, Any]) -> None:
        self.append(record)

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self if record["kind"] == kind]


class Telemetry:
    """All of a run's output files."""

    QUIET_S = 60.0  # between two complaints about the disk

    def __init__(
        self,
        run_dir: Path,
        resume: Resume | None,
        say: Say,
        board: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """`board`: whether TensorBoard's files are written; `trackers` get the same scalars. Raises
        `OSError`.
        """
        self._say = say
        self._full = self._complained = False  # some records wait; and that was said
        self._complained_at = -math.inf
        self.metrics = JsonLines(run_dir / "metrics.jsonl", resume, self._refused)
        self.ledger = JsonLines(run_dir / "ledger.jsonl", resume, self._refused)
        self.samples = JsonLines(run_dir / "samples.jsonl", resume, self._refused)
        self.warnings = JsonLines(run_dir / "warnings.jsonl", resume, self._refused)
        self.trace = Trace(run_dir / "trace.json", self._refused)
        self.board = _board(run_dir / "tensorboard", resume, self._refused) if board else None
        self.trackers = trackers
        self._records = [one.file for one in (self.metrics, self.ledger, self.samples, self.warnings)]
        self._files = [*self._records, self.trace.file, *([] if self.board is None else [self.board.file])]
        self._busy: dict[str, float] = defaultdict(float)
        self._busy_total: dict[str, float] = defaultdict(float)
        self._window = self._began = time.time()

    def span(self, worker: str, span: Span) -> None:
        """Note what a worker did; waiting, and copying weights, do not count as busy."""
        self.trace.add(worker, span)
        if self._full:
            self._try_again()
        if span.name in BUSY:
            self._busy[worker] += span.end - span.start
            self._busy_total[worker] += span.end - span.start

    def _refused(self, path: Path, error: OSError) -> None:
        self._full = True
        if not self._complained and time.monotonic() - self._complained_at > self.QUIET_S:
            self._complained, self._complained_at = True, time.monotonic()
            self._say(f"{path}: {error.strerror}; records wait in memory until the disk takes them")

    def _try_again(self) -> None:
        with contextlib.suppress(OSError):
            for file in self._files:
                file.flush()
            self._full = False
        if self._complained and not self._full:
            self._complained = False
            self._say("the disk takes records again; none is lost")

    def busy_shares(self) -> dict[str, float]:
        """Each role's busy share since the last call, averaged over its workers."""
        now = time.time()
        shares = _by_role(self._busy, now - self._window)
        self._window = now
        for worker in self._busy:
            self._busy[worker] = 0.0
        return shares

    def busy_shares_total(self) -> dict[str, float]:
        """The same since the start."""
        return _by_role(self._busy_total, time.time() - self._began)

    def scalars(self, values: dict[str, float], step: int) -> None:
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(finite, step)
        if self.board is not None:
            for name, value in finite.items():
                self.board.scalar(name, value, step)

    def histograms(self, values: dict[str, np.ndarray], step: int) -> None:
        if self.board is None:
            return
        for name, array in values.items():
            finite = array[np.isfinite(array)]
            if len(finite):
                self.board.histogram(name, finite, step)

    def flush(self) -> None:
        """Write what waits for room on the disk, except the timeline and the curves. Raises `OSError`."""
        for file in self._records:
            file.flush()

    def close(self) -> None:
        self._try_again()
        for file in self._files:
            if file.waiting:
                self._say(f"{file.path}: the disk does not take its last {file.waiting} records")
            file.close()
        for tracker in self.trackers:
            tracker.close()


class Display(Protocol):
    """What a person watching the run sees. None of it can end the run."""

    def step(self, step: int, metrics: dict[str, str], busy: Mapping[str, float]) -> None:
        """An optimizer step is done; `busy` is the share of each role since the last."""

    def evaluated(self, record: Mapping[str, Any]) -> None: ...

    def sampled(self, record: Mapping[str, Any]) -> None:
        """A sample was written as text."""

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """One tqdm bar on a terminal; plain lines, at most one every few seconds, elsewhere.

    A closed terminal, or a pipe without a reader, does not end a run: it goes on silently.
    """

    EVERY_S = 5.0

    def __init__(self, steps: int, initial: int) -> None:
        self.steps, self._last, self._bar = steps, 0.0, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=initial, unit="step", dynamic_ncols=True)

    def step(self, step: int, metrics: dict[str, str], busy: Mapping[str, float]) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)
                self._bar.set_postfix(metrics, refresh=False)
        elif time.time() - self._last > self.EVERY_S or step == self.steps:
            self._last = time.time()
            self.say(f"step {step}/{self.steps}  " + "  ".join(f"{k} {v}" for k, v in metrics.items()))

    def evaluated(self, record: Mapping[str, Any]) -> None: ...

    def sampled(self, record: Mapping[str, Any]) -> None: ...

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()


def _board(folder: Path, resume: Resume | None, refused: Refused) -> Board:
    from fopd_cli.runtime.journal.board import Board  # torch

    return Board(folder, None if resume is None else resume.step + 1, refused)


def mean_and_error(grades: Iterable[Iterable[float]]) -> tuple[float, float]:
    """mean@k over prompts and its standard error: samples of one prompt are averaged first, since they
    correlate.
    """
    per_prompt = np.array([np.mean(list(g)) for g in grades])
    per_prompt = per_prompt[np.isfinite(per_prompt)]
    if len(per_prompt) == 0:
        return math.nan, math.nan
    spread = float(per_prompt.std(ddof=1)) if len(per_prompt) > 1 else math.nan
    return float(per_prompt.mean()), spread / math.sqrt(len(per_prompt))


def _by_role(busy: dict[str, float], seconds: float) -> dict[str, float]:
    workers: dict[str, list[float]] = defaultdict(list)
    for worker, value in busy.items():
        workers[worker.partition("-")[0]].append(value / max(seconds, 1e-9))
    return {role: min(1.0, sum(values) / len(values)) for role, values in workers.items()}


def _finite(value: Any) -> Any:
    """JSON has no nan: null stands for what could not be measured."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
