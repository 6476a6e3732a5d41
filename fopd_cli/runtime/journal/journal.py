"""What a run writes down and says. The conductor tells it what happened; it keeps the clock and the sums.

    conductor ──trained, evaluated, ...──> Journal ──records.py──> sinks.py: files, TensorBoard, progress

`begin` is called once every worker is ready: until then the files on disk describe the previous run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fopd_cli.engines.models import hf
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.buffer import Entry
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.pace import Pace, readable
from fopd_cli.runtime.journal.sinks import Changes, Display, Progress, Resume, Sinks
from fopd_cli.runtime.journal.totals import Totals
from fopd_cli.runtime.journal.utilization import Utilization
from fopd_cli.runtime.journal.watch import Watch
from fopd_cli.runtime.scheduling.schedule import Schedule
from fopd_cli.samples import Rollout, SampleId, SampleStats, StepReport

OpenSinks = Callable[[Resume | None, Changes], Sinks]
OpenDisplay = Callable[[int, int], Display]
SAMPLES = 20  # written as text in a whole run


class Measured(NamedTuple):
    """A sample of an evaluation. `held_out` is the name of its set if there are several; `shown`: it is
    written down as text.
    """

    sample: SampleId
    entry: Entry
    held_out: str | None
    shown: bool


@dataclass
class _Evaluation:
    """The evaluation under way: what the learner measured, in parts, and of which samples."""

    stats: list[SampleStats] = field(default_factory=list)
    rows: list[Measured] = field(default_factory=list)


class Journal:
    """Use as a context manager: leaving it closes all files."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        open_sinks: OpenSinks,
        quiet: bool = False,
        display: OpenDisplay = Progress,
        at_peak: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """`display` gets the number of steps, and how many are done. `at_peak`: see `Utilization`."""
        self._utilization = Utilization(at_peak)
        self.recipe, self.tokenizer, self.quiet = recipe, tokenizer, quiet
        self._open_display = display
        self._open_sinks = open_sinks
        self.totals = Totals()
        self._watch = Watch(recipe.learner.clip)
        self._resume: Resume | None = None
        self._changes: Changes = {}
        self._progress: Display | None = None
        self._sinks: Sinks | None = None
        self._evaluation = _Evaluation()
        self._pace = Pace(recipe.learner.steps, recipe.eval.every or recipe.learner.steps)
        self._load: dict[str, float] = {}  # a sampler's latest weight update
        # lines of metrics.jsonl that wait for the publication of a step's version; the step's is the first
        self._unpublished: list[dict[str, Any]] = []
        self._began = self._step_began = self._version_since = time.time()
        self._cpu = time.process_time()

    def resume(self, at: Resume, totals: Mapping[str, Any], changes: Changes) -> None:
        """Go on from a checkpoint; `changes` to the recipe go into the history."""
        self._resume, self.totals, self._changes = at, Totals(**totals), changes

    def __enter__(self) -> Journal:
        self._began = time.time() - self.totals.wall_seconds
        if not self.quiet:
            done = self._resume.step if self._resume else 0
            self._progress = self._open_display(self.recipe.learner.steps, done)
        return self

    def __exit__(self, *_: Any) -> None:
        for one in (self._sinks, self._progress):  # files may have something to say
            if one is not None:
                one.close()

    def begin(self) -> None:
        """Every worker is ready: from here on the files on disk describe this run."""
        self._sinks = self._open_sinks(self._resume, self._changes)
        self._version_since = time.time()

    @property
    def sinks(self) -> Sinks:
        """After `begin`."""
        assert self._sinks is not None
        return self._sinks

    def flush(self) -> None:
        """Everything that was recorded is in its files. Raises `OSError` if the disk does not take it."""
        self.sinks.flush()

    # ---- for people ----------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)

    def warn(self, step: int, text: str) -> None:
        """Say what is going wrong, and record it."""
        self.say(f"step {step}: {text}")
        self.sinks.warnings.write({"step": step, "text": text})

    # ---- what happened -------------------------------------------------------------------------------------

    def worked(self, worker: str, span: Span) -> None:
        """A worker did something."""
        self.sinks.span(worker, span)
        self._utilization.worked(worker, span)

    def sampled(self, rollout: Rollout) -> None:
        self.totals.generated_tokens += generated(rollout)

    def loaded(self, span: Span) -> None:
        """A sampler has loaded new weights."""
        self._load = {f"load_{k}": span.args[k] for k in ("ms", "gb_per_s")}

    def step_begins(self) -> None:
        self._step_began = time.time()

    @property
    def step_seconds(self) -> float:
        """Since the latest step began."""
        return time.time() - self._step_began

    def trained(
        self, report: StepReport, batch: Sequence[tuple[SampleId, Entry]], runtime: Mapping[str, Any]
    ) -> None:
        """An optimizer step is done; its metrics are written once its version is `published`. `batch` is in
        the order of `report.stats`; `runtime` holds metrics that depend on the clock, as they were then: the
        next one may have begun.
        """
        step, stats = report.step + 1, report.stats
        self.totals.count(stats, report.skipped)
        rollouts = [entry.rollout for _, entry in batch]
        self._version_since = time.time()
        timing = {
            "conductor_seconds": self._cpu_seconds(),
            "busy": self.sinks.busy_shares(),
            **self._utilization.step(),
            **runtime,
            **records.tool_seconds(rollouts),
            "wall_seconds": self.wall_seconds,
            **self._load,
        }
        record = records.step(step, report, rollouts, [entry.score for _, entry in batch])
        outcomes = {
            str(sample): records.outcome(weight)
            for (sample, _), weight in zip(batch, stats.weight, strict=True)
        }
        self._unpublished = [{**record, "timing": timing}]
        self.sinks.ledger.write(records.ledger(step, outcomes))
        self.sinks.histograms(records.histograms(stats), step)
        if self._progress is not None:
            self._pace.step(step, time.time())
            left = self._pace.remaining()
            eta = {} if left is None else {"left": readable(left)}
            self._progress.step(step, {**records.bar(record, timing), **eta}, timing["busy"])
        for warning in self._watch.step(report.grad_norm, record["kl"], record["kl_by_quartile"]):
            self.warn(step, warning)
        if step % max(1, self.recipe.learner.steps // SAMPLES) == 0:
            self._write_sample(step, *batch[0])

    def published(self, nbytes: int, span: Span) -> None:
        """All of the last step's version can be loaded."""
        seconds, lines = span.end - span.start, self._unpublished
        self._unpublished = []
        timing = lines[0]["timing"]
        timing["publish_seconds"], timing["publish_bytes"] = seconds, nbytes
        timing["publish_gb_per_s"] = nbytes / 1e9 / max(seconds, 1e-9)
        for line in lines:
            self.sinks.metrics.write(line)
        self.sinks.scalars(records.scalars(lines[0], timing), lines[0]["step"])

    def evaluated_samples(self, stats: SampleStats, rows: Iterable[Measured]) -> None:
        """Some of an evaluation's samples are done, in the order of their `stats`."""
        self._evaluation.stats.append(stats)
        self._evaluation.rows.extend(rows)

    def evaluated(self, version: int) -> None:
        """All of them are done."""
        stats, rows = self._evaluation.stats, self._evaluation.rows
        self._evaluation = _Evaluation()
        samples = [(row.sample, row.entry.score, row.entry.rollout) for row in rows]
        metrics, sets = [row.entry.metrics for row in rows], [row.held_out for row in rows]
        record = records.evaluation(version, stats, samples, metrics, sets, self.recipe.eval.follow)
        self.totals.evaluations[str(version)] = record
        timing = {
            **records.tool_seconds([rollout for _, _, rollout in samples]),
            "seconds": time.time() - self._version_since,
            "wall_seconds": self.wall_seconds,
        }
        self._pace.evaluated(timing["seconds"])
        self.sinks.metrics.write({**record, "timing": timing})
        self.sinks.scalars(records.evaluation_scalars(record), version)
        found = [part for s in stats for part in zip(s.token_kl, s.likeliest, strict=True)]
        measured = zip(rows, found, strict=True)
        for row, (kl, likeliest) in sorted(measured, key=lambda pair: pair[0].sample.prompt):
            if row.shown:
                self._write_sample(version, row.sample, row.entry, kl, likeliest)
        self.say(records.evaluation_line(record))
        if self._progress is not None:
            self._progress.evaluated(record)

    def refreshed(self, step: int, reason: str, samples: Iterable[SampleId]) -> None:
        """The buffer was dropped."""
        ids = [str(sample) for sample in samples]
        timing = {"dropped": len(ids)}
        line = {"kind": "refresh", "step": step, "reason": reason, "timing": timing}
        (self._unpublished.append if self._unpublished else self.sinks.metrics.write)(line)
        self.sinks.ledger.write({"step": step, "refreshed": ids})
        self.say(f"step {step}: refreshing the buffer ({reason}); {len(ids)} samples dropped")

    def _write_sample(
        self,
        step: int,
        sample: SampleId,
        entry: Entry,
        token_kl: np.ndarray | None = None,
        likeliest: records.Likeliest = None,
    ) -> None:
        """As text; with `token_kl`, that of each token that the student sampled, also token by token, beside
        what the teacher would rather have written, if known.
        """
        rollout = entry.rollout
        record: dict[str, Any] = {
            "kind": sample.split,
            "step": step,
            "sample": str(sample),
            "versions": rollout.spans,
            "prompt": hf.decode(self.tokenizer, rollout.token_ids[: rollout.prompt_length]),
            "response": hf.decode(self.tokenizer, rollout.response_ids),
            "score": entry.score,
            "finish": rollout.finish,
        }
        if rollout.turns:
            record |= {"turns": rollout.turns, "calls": rollout.calls}
        if token_kl is not None:
            record["kl"] = float(token_kl.mean()) if len(token_kl) else None
            record["pieces"] = records.pieces(self.tokenizer, rollout, token_kl, likeliest)
        self.sinks.samples.write(record)
        if self._progress is not None:
            self._progress.sampled(record)

    def _cpu_seconds(self) -> float:
        """Seconds of a core that this process has used since the last call."""
        before, self._cpu = self._cpu, time.process_time()
        return self._cpu - before

    # ---- sums ----------------------------------------------------------------------------------------------

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, restarts included."""
        return time.time() - self._began

    def kept_totals(self, given_up: Iterable[Rollout]) -> dict[str, Any]:
        """The totals for a checkpoint. Samples that a resumed run samples again do not count: those
        `given_up`, and those of a half-done evaluation.
        """
        again = [*given_up, *(row.entry.rollout for row in self._evaluation.rows)]
        return {
            **vars(self.totals),
            "wall_seconds": self.wall_seconds,
            "generated_tokens": self.totals.generated_tokens - sum(map(generated, again)),
        }

    def summary(self, schedule: Schedule, student: Mapping[str, Any]) -> dict[str, Any]:
        """The summary of the whole run; `student` says which one was exported, and why."""
        self.totals.wall_seconds = self.wall_seconds
        busy = self.sinks.busy_shares_total()
        return {**records.summary(schedule, self.totals, busy), **student}


def generated(rollout: Rollout) -> int:
    """Tokens that the student sampled; observations between them do not count."""
    return int(rollout.loss_mask.sum())
