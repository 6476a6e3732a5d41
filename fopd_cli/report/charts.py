"""The curves on the page and their points: plain data that `page.js` passes to uPlot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fopd_cli.report.reading import Record, Run, sets_of

MOST_POINTS = 240  # per curve; more than that are averaged, since a phone cannot show them
BUSY_POINTS = 40  # single steps mean little where roles take turns
Value = float | None


@dataclass(frozen=True)
class Line:
    """One curve of a chart: a record's `value` and `error`. `faint` curves accompany a more important one."""

    label: str
    value: Callable[[Record], Value]
    of: Literal["steps", "evaluations"] = "steps"
    error: Callable[[Record], Value] | None = None
    faint: bool = False

    @property
    def dots(self) -> bool:
        """Whether points are drawn, because there are few and each counts."""
        return self.of == "evaluations"


def key(name: str) -> Callable[[Record], Value]:
    return lambda record: record.get(name)


def timing(name: str, scale: float = 1.0) -> Callable[[Record], Value]:
    def value(record: Record) -> Value:
        found = record.get("timing", {}).get(name)
        return None if found is None else found * scale

    return value


def held_out(label: str, name: str) -> Line:
    return Line(label, key(name), "evaluations", key(f"{name}_error"))


# (title, note, unit, curves). Several runs are compared by the first curve; score and KL by the first two.
CHARTS: list[tuple[str, str, str, list[Line]]] = [
    (
        "Score",
        "Held out, with its standard error over prompts; and of the samples trained on.",
        "",
        [held_out("held out", "score"), Line("training", key("score"), faint=True)],
    ),
    (
        "KL to the teacher",
        "How far the student is from the teacher on its own answers. Less is better.",
        "nats per token",
        [held_out("held out", "kl"), Line("training", key("kl"), faint=True)],
    ),
    (
        "Freshness",
        "Mean over the batch, and the mean weight that follows. 1: sampled by the student as it is now.",
        "",
        [Line("freshness", key("freshness")), Line("weight", key("weight"), faint=True)],
    ),
    (
        "Lag",
        "How many optimizer steps old the samples of a batch are.",
        "steps",
        [Line("mean", key("lag_mean")), Line("largest", key("lag_max"), faint=True)],
    ),
    (
        "Drift",
        "How far the student has moved since it sampled (roll), the teacher since it judged (sup), "
        "and what is only rounding (floor).",
        "nats per token",
        [Line("roll", key("drift_roll")), Line("sup", key("drift_sup")), Line("floor", key("noise_floor"))],
    ),
    ("Loss", "What the optimizer sees, weights and anchor included.", "", [Line("loss", key("loss"))]),
    (
        "Entropy",
        "Of the student, over the vocabulary. Near 0 it always says the same.",
        "nats per token",
        [Line("held out", key("entropy"), "evaluations"), Line("training", key("entropy"), faint=True)],
    ),
    ("Response length", "Mean of a batch.", "tokens", [Line("training", key("response_length"))]),
    (
        "Cut off",
        "Share of the responses that reached max_new_tokens.",
        "",
        [Line("training", key("truncated"))],
    ),
    ("Gradient norm", "Before clipping.", "", [Line("norm", key("grad_norm"))]),
    ("Learning rate", "", "", [Line("lr", key("lr"))]),
]
ROLES = ("sampler", "teacher", "learner", "grader", "environment")


def charts(runs: Sequence[Run]) -> list[Record]:
    """All charts that have data. A series has a `label`, its style, and points `x` (step), `t` (minutes),
    `y`, `e` (error).
    """
    found = []
    for title, note, unit, lines in CHARTS:
        shown = lines if len(runs) == 1 else lines[: 2 if title in ("Score", "KL to the teacher") else 1]
        series = [s for n, run in enumerate(runs) for s in _series(n, run, shown, len(runs) > 1)]
        if any(s["y"] for s in series) and not (title == "Cut off" and not any(any(s["y"]) for s in series)):
            logarithmic = all(v > 0 for s in series for v in s["y"])
            found.append({"title": title, "note": note, "unit": unit, "log": logarithmic, "series": series})
    for name in sets_of(runs):
        found += _of_set(name, runs)
    found += [chart for n, run in enumerate(runs) for chart in _of_machine(n, run, len(runs) > 1)]
    return found


def _of_set(name: str, runs: Sequence[Run]) -> list[Record]:
    """Score and KL on one of several held-out sets."""
    found = []
    for title, _, unit, lines in CHARTS[:2]:
        series = [
            s for n, run in enumerate(runs) for s in _series(n, run.of_set(name), lines[:1], len(runs) > 1)
        ]
        if series:
            logarithmic = all(v > 0 for s in series for v in s["y"])
            note = f"On the held-out set {name}, with its standard error over prompts."
            shown = {"title": f"{title}: {name}", "note": note, "unit": unit, "log": logarithmic}
            found.append({**shown, "series": series})
    return found


def _series(
    number: int, run: Run, lines: Sequence[Line], several: bool, most: int = MOST_POINTS
) -> list[Record]:
    found = []
    for i, line in enumerate(lines):
        records = getattr(run, line.of)
        points = [
            (r["step"], _minutes(r), line.value(r), line.error(r) if line.error else None) for r in records
        ]
        points = [p for p in points if p[2] is not None]
        if not points or (line.label in ("sup", "floor") and not any(p[2] for p in points)):
            continue
        label = (
            f"{run.name}, {line.label}" if several and len(lines) > 1 else run.name if several else line.label
        )
        look = {"colour": number if several else i, "faint": line.faint, "dots": line.dots}
        found.append({"label": label, **look, **_thinned(points, most)})
    return found


def _of_machine(number: int, run: Run, several: bool) -> list[Record]:
    """Busy shares, speed and memory, with a chart for each run."""
    of_run = f" of {run.name}" if several else ""
    roles = [r for r in ROLES if any(r in s.get("timing", {}).get("busy", {}) for s in run.steps)]
    busy = [Line(role, partial(_busy, role)) for role in roles]
    memory = [Line(role, partial(_memory, role)) for role in roles]
    memory.append(Line("teacher targets", timing("buffer_bytes", 1e-9)))
    speed = [Line("trained", _speed(run))]
    specs = [
        (
            "Busy",
            "Share of the time in which a role computes; what is missing to 1 it was idle.",
            "",
            busy,
            BUSY_POINTS,
        ),
        ("Speed", "Tokens trained on, a second of wall time.", "tokens/s", speed, BUSY_POINTS),
        ("Memory", "Main memory of each role's processes, and the shared buffer.", "GB", memory, MOST_POINTS),
    ]
    found: list[Record] = [
        {
            "title": title + of_run,
            "note": note,
            "unit": unit,
            "log": False,
            "series": _series(number, run, lines, False, most),
        }
        for title, note, unit, lines, most in specs
    ]
    return [chart for chart in found if chart["series"]]


def _busy(role: str, step: Record) -> Value:
    return step.get("timing", {}).get("busy", {}).get(role)


def _memory(role: str, step: Record) -> Value:
    sizes = step.get("timing", {}).get("memory_bytes") or {}
    own = [size for worker, size in sizes.items() if worker.partition("-")[0] == role]
    return sum(own) / 1e9 if own else None


def _speed(run: Run) -> Callable[[Record], Value]:
    seconds = {r["step"]: r.get("timing", {}).get("wall_seconds") for r in run.steps}

    def value(record: Record) -> Value:
        now, before = seconds.get(record["step"]), seconds.get(record["step"] - 1)
        return (
            record["tokens"] / (now - before)
            if now is not None and before is not None and now > before
            else None
        )

    return value


def _minutes(record: Record) -> float:
    return float(record.get("timing", {}).get("wall_seconds") or 0) / 60


def _thinned(points: list[tuple[Any, ...]], most: int) -> Record:
    """At most `most` points, each the mean of a few neighbors."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]

    def mean(index: int) -> list[Value]:
        found = []
        for group in groups:
            values = [p[index] for p in group if p[index] is not None]
            found.append(float(f"{sum(values) / len(values):.5g}") if values else None)
        return found

    return {"x": mean(0), "t": mean(1), "y": mean(2), "e": mean(3) if size == 1 else [None] * len(groups)}
