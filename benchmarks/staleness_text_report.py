"""The runs of benchmarks/staleness.py on real text, as a table: judged by their KL to the teacher, because
answers of 48 tokens are too short to be right.

A KL is in nats per token, on the student's own held-out answers, which differ from run to run. It compares
runs of one loss only: of a policy gradient it is a mean of sampled log-ratios, of top-k and tail it is over
k + 1 classes. KL(teacher || student) on the teacher's answers is the same measure for every run, and of the
untrained student it is the same number in all runs of a folder.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from staleness_names import (
    CACHED,
    CONSTANT_ANCHOR,
    ON_TEXT,
    SAMPLED,
    UP_TO,
    WEAKENING,
    full_label,
    longest,
    rank,
)

Result = dict[str, Any]
TEXT = "text"
# A run of real text has collapsed if it ends at this many times its synchronous run's KL on the teacher's
# answers, which no silence makes small,
WORSE = 2.0
# or, where that was not measured, if its KL was ever above this many times where it began. A KL on a
# student's own answers that only falls acquits nobody.
ROSE = 1.1
LEARNT = 0.1  # the least that sync must gain, of its KL at first, for shares of that gain to mean something


@dataclass(frozen=True)
class TextRow:
    """Runs of one loss, policy, lag and overrides; figures are means over their seeds. `base`: the
    synchronous runs that they are compared with, of the same seeds where there are such. All policy gradients
    from sampled tokens share those of the cached one, unless they have their own.
    """

    loss: str
    policy: str
    lag: str
    extra: tuple[str, ...]
    runs: list[Result]
    base: list[Result]
    untrained: float | None  # the student's KL on the teacher's answers before the first step

    @property
    def first(self) -> float:
        return statistics.fmean(r["kl_curve"][0][1] for r in self.runs)

    @property
    def last(self) -> float:
        return _last(self.runs)

    @property
    def on_answers(self) -> float | None:
        return _on_answers(self.runs)

    @property
    def collapsed(self) -> int | None:
        """How many of its runs have; None if what was measured does not tell."""
        found = [collapsed(r, self.base) for r in self.runs]
        return None if None in found else sum(map(bool, found))

    @property
    def of_gain(self) -> float | None:
        """The share of the synchronous runs' fall in KL, from where these began: the untrained student's KL
        is sampled, and differs between runs. None if they learnt little, or if a run collapsed.
        """
        if not self.base or self.collapsed:
            return None
        first = statistics.fmean(r["kl_curve"][0][1] for r in self.base)
        return _share(first, _last(self.base), self.last)

    @property
    def of_gain_on_answers(self) -> float | None:
        """The same on the teacher's answers."""
        theirs, own = _on_answers(self.base), self.on_answers
        if self.untrained is None or theirs is None or own is None or self.collapsed:
            return None
        return _share(self.untrained, theirs, own)


def collapsed(run: Result, base: Sequence[Result]) -> bool | None:
    """Whether a run on real text has collapsed; `base`: the synchronous runs of its loss. None: not known."""
    own, theirs = run.get("kl_on_answers"), _on_answers(base)
    if own is not None and theirs is not None:
        return bool(own > WORSE * theirs)
    if run["loss"].startswith("topk"):
        return None
    first, *later = (kl for _, kl in run["kl_curve"])
    return True if max(later, default=first) > ROSE * first else None


def text_rows(results: Sequence[Result]) -> list[TextRow]:
    """By loss, overrides and lag; sync first."""
    groups: dict[tuple[str, tuple[str, ...], str, str], list[Result]] = defaultdict(list)
    for r in (r for r in results if r["task"] == TEXT):
        groups[r["loss"], tuple(r["extra"]), r["lag"], r["policy"]].append(r)

    def place(group: tuple[str, tuple[str, ...], str, str]) -> tuple[Any, ...]:
        loss, extra, lag, policy = group
        known = list(ON_TEXT).index(loss) if loss in ON_TEXT else len(ON_TEXT)
        return known, loss, extra, longest(lag), lag, rank(policy)

    def base(loss: str, extra: tuple[str, ...], runs: list[Result]) -> list[Result]:
        sync = groups.get((loss, extra, "0", "sync"), [])
        if not sync and loss in SAMPLED:
            # without lag the ratio is 1, and an advantage that is computed again is the cached one
            sync = groups.get((CACHED, extra, "0", "sync"), [])
        seeds = {r["seed"] for r in runs}
        same = [r for r in sync if r["seed"] in seeds]
        return same if len(same) == len(seeds) else sync

    untrained = next((r["kl_on_answers_at_first"] for r in results if r.get("kl_on_answers_at_first")), None)
    return [
        TextRow(loss, policy, lag, extra, groups[key], base(loss, extra, groups[key]), untrained)
        for key in sorted(groups, key=place)
        for loss, extra, lag, policy in [key]
    ]


def text_markdown(results: Sequence[Result]) -> str:
    """A line per loss, policy and lag, and one on what was run; nothing if nothing was."""
    found = text_rows(results)
    if not found:
        return ""
    heads = ["loss", "policy", "lag (mean)", "seeds", "KL at first", "KL at last", "of sync's gain"]
    heads += ["on the teacher's answers", "of sync's gain there", "D_roll", "collapsed"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    previous = ""
    for row in found:
        loss = ON_TEXT.get(row.loss, row.loss)
        lines.append(f"| {' | '.join(('' if loss == previous else loss, *_cells(row)))} |")
        previous = loss
    runs = [r for row in found for r in row.runs]
    seconds = [r["wall_seconds"] for r in runs]
    floor = [r["drift_roll"] for r in runs if r["lag"] == "0"]
    said = [f"{len(runs)} runs, {min(seconds):,.0f} to {max(seconds):,.0f} s each."]
    if found[0].untrained is not None:
        said.append(f"The untrained student has {found[0].untrained:.2f} on the teacher's answers.")
    if floor:
        said.append(
            f"D_roll of synchronous samples, the noise floor: {min(floor):.4f} to {max(floor):.4f} nats."
        )
    return "\n".join([*lines, "", *said])


def summary(results: Sequence[Result]) -> str:
    """Shares of sync's gain at lag 8 by loss, without control and with the defaults."""
    found = {(row.loss, row.policy, row.lag): row for row in text_rows(results) if not row.extra}
    lines = []
    for loss, name in ON_TEXT.items():
        today = WEAKENING if loss in SAMPLED else CONSTANT_ANCHOR
        columns = [("async", "8"), ("async", f"{UP_TO}8"), (today, "8"), (today, f"{UP_TO}8")]
        cells = [_kept(found.get((loss, *column))) for column in columns]
        lines.append(f"| {' | '.join((name, *cells))} |")
    heads = ["of sync's gain: own / teacher's answers", "async, lag 8", "async, up to 8"]
    heads += ["defaults, lag 8", "defaults, up to 8"]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines])


def _kept(row: TextRow | None) -> str:
    if row is None:
        return "-"
    seeds = f" ({len(row.runs)})" if len(row.runs) > 1 else ""
    if row.collapsed:
        return f"collapsed{seeds}"
    own, theirs = (
        "-" if share is None else f"{share:.0%}" for share in (row.of_gain, row.of_gain_on_answers)
    )
    return f"{own} / {theirs}{seeds}"


def _cells(row: TextRow) -> list[str]:
    mean_lag = statistics.fmean(r["lag_mean"] for r in row.runs)
    drift = statistics.fmean(r["drift_roll"] for r in row.runs)
    share, theirs, there = row.of_gain, row.on_answers, row.of_gain_on_answers
    seeds = len(row.runs)
    return [
        full_label(row.policy, row.loss, row.lag, row.extra),
        row.lag if row.lag == "0" else f"{row.lag.replace('<=', 'up to ')} ({mean_lag:.1f})",
        str(seeds),
        f"{row.first:.2f}",
        f"{row.last:.3f}" + (f" ± {_error([r['kl'] for r in row.runs]):.3f}" if seeds > 1 else ""),
        "-" if share is None else f"{share:.0%}",
        "-" if theirs is None else f"{theirs:.2f}",
        "-" if there is None else f"{there:.0%}",
        f"{drift:.2g}" if drift < 0.1 else f"{drift:.2f}",
        "-" if row.collapsed is None else f"{row.collapsed}/{seeds}",
    ]


def _share(first: float, base: float, last: float) -> float | None:
    """Of a fall from `first` to `base`, which one to `last` is; None if that fall is hardly one."""
    gain = first - base
    return (first - last) / gain if gain > LEARNT * first else None


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def _last(runs: Sequence[Result]) -> float:
    return statistics.fmean(r["kl"] for r in runs)


def _on_answers(runs: Sequence[Result]) -> float | None:
    known = [r["kl_on_answers"] for r in runs if r.get("kl_on_answers") is not None]
    return statistics.fmean(known) if known else None
