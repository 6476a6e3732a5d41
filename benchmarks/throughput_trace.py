"""Where a run's time goes, from its trace.json: what each stage did in a window of time, and what it waited
for.

    sampler   generate | generate | ...... | .. | load | generate       waits: weights | handover
    learner   train | publish | ...... | ......... | .. | train         waits: samples | stragglers | handover

A *handover* is the time from the moment at which a stage could go on until it does: the conductor and the
queues.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = {"sampler": "generate", "teacher": "score", "learner": "train"}  # with what each is there for


@dataclass(frozen=True)
class Span:
    kind: str
    start: float  # seconds since the epoch
    end: float
    args: dict[str, Any]


@dataclass(frozen=True)
class Window:
    """From the end of one optimizer step to the end of another."""

    start: float
    end: float
    steps: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


# Of each stage, and of what the learner does beside its steps (`learner beside`), ordered by start.
Timeline = dict[str, list[Span]]
BESIDE = "learner beside"


def timeline(run: Path) -> Timeline:
    """The spans of a run's only sampler, teacher and learner."""
    from fopd_cli.runtime.journal.trace import read_trace

    events = read_trace((run / "trace.json").read_text(encoding="utf-8"))
    tracks = {e["tid"]: e["args"]["name"] for e in events if e.get("ph") == "M"}
    names = {f"{stage}-0": stage for stage in STAGES}
    names |= {name: BESIDE for name in tracks.values() if name.startswith("learner-0-")}
    found: Timeline = {track: [] for track in (*STAGES, BESIDE)}
    for e in events:
        if e.get("ph") == "X" and (track := names.get(tracks[e["tid"]])):
            start = e["ts"] / 1e6
            found[track].append(Span(e["name"], start, start + e["dur"] / 1e6, e.get("args", {})))
    return {track: sorted(spans, key=lambda s: (s.start, s.end)) for track, spans in found.items()}


def window(found: Timeline, first: int, steps: int) -> Window:
    """From the end of optimizer step `first` (1-based) on, over `steps` steps."""
    ends = [s.end for s in found["learner"] if s.kind == "train"]
    return Window(ends[first - 1], ends[first - 1 + steps], steps)


def union(spans: Iterable[Span], within: Window) -> list[tuple[float, float]]:
    """Disjoint intervals, ordered, that the spans cover within the window."""
    out: list[tuple[float, float]] = []
    for s in spans:
        start, end = max(s.start, within.start), min(s.end, within.end)
        if end <= start:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def shares(found: Timeline, within: Window) -> dict[str, dict[str, float]]:
    """Of each stage: the share of the window that each kind of work took, and `idle`; they add up to 1.

    Other work within a stage's main one (weights that are loaded in mid-rollout) counts as the other work.
    """
    out = {}
    for stage, main in STAGES.items():
        spans = found[stage]
        kinds = sorted({s.kind for s in spans} - {main})
        seconds = {kind: covered(union((s for s in spans if s.kind == kind), within)) for kind in kinds}
        busy = covered(union(spans, within))
        seconds[main] = busy - sum(seconds.values())
        out[stage] = {kind: s / within.seconds for kind, s in seconds.items() if s > 0}
        out[stage]["idle"] = 1 - busy / within.seconds
    return out


def gaps(spans: Iterable[Span], within: Window) -> list[tuple[float, float]]:
    """When nothing was done."""
    edges = [within.start, *(t for interval in union(spans, within) for t in interval), within.end]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def sampler_waits(found: Timeline, within: Window) -> dict[str, float]:
    """Seconds in which the sampler was idle: until the weights that it loads next were published
    (`weights`), from then until it loads them (`handover`), and for anything else (`other`).
    """
    learner = [*found["learner"], *found[BESIDE]]
    published = {s.args["version"]: s.end for s in learner if s.kind == "publish"}
    spans = found["sampler"]
    starts = [s.start for s in spans]
    waits = dict.fromkeys(("weights", "handover", "other"), 0.0)
    for start, end in gaps(spans, within):
        after = bisect_right(starts, end - 1e-6)  # the span that ends the gap
        following = spans[after] if after < len(spans) else None
        if following is None or following.kind != "load":
            waits["other"] += end - start
            continue
        known = min(max(published.get(following.args["version"], start), start), end)
        waits["weights"] += known - start
        waits["handover"] += end - known
    return waits


def learner_waits(found: Timeline, within: Window, batch: int, held_out: int) -> dict[str, float]:
    """Seconds in which the learner was idle: until a batch of samples was scored (`samples`), from then until
    the last of those came that it could not do without (`stragglers`), and from then on (`handover`).

    `held_out` samples were scored before the first step. Counts samples, so it must not be asked of a run
    that drops samples or scores some again.
    """
    scored, ready = [], 0  # (when, how many in all)
    for s in sorted((s for s in found["teacher"] if s.kind == "score"), key=lambda s: s.end):
        ready += s.args["samples"]
        scored.append((s.end, ready))
    ends = [end for end, _ in scored]
    trains = [s.start for s in found["learner"] if s.kind == "train"]
    waits = dict.fromkeys(("samples", "stragglers", "handover"), 0.0)
    for start, end in gaps(found["learner"], within):
        taken = held_out + batch * bisect_right(trains, end - 1e-6)
        enough = next((when for when, count in scored if count >= taken + batch), end)
        enough = min(max(enough, start), end)
        late = bisect_right(ends, end) - 1
        last = max(ends[late], enough) if late >= 0 else enough
        waits["samples"] += enough - start
        waits["stragglers"] += last - enough
        waits["handover"] += end - last
    return waits


def drawn_down(found: Timeline, within: Window, batch: int) -> float:
    """How many batches the teacher scored in the window beyond those that were trained; negative if the
    learner lived on what was in the buffer.
    """
    scored = sum(
        s.args["samples"]
        for s in found["teacher"]
        if s.kind == "score" and within.start < s.end <= within.end
    )
    return scored / batch - within.steps


def per_step(seconds: dict[str, float], within: Window) -> dict[str, float]:
    return {cause: value / within.steps for cause, value in seconds.items()}
