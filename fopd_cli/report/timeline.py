"""trace.json as two pictures: how busy each worker was over the whole run, and a close-up of a few steps."""

from __future__ import annotations

import html
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from fopd_cli.names import is_beside
from fopd_cli.report.reading import Record
from fopd_cli.runtime.journal.trace import read_trace

WIDTH, LABEL, ROW, GAP = 960, 96, 22, 8  # in the drawing's own units
BINS = 216
CLOSE_STEPS = 6
MOST_SPANS = 600
PAUSE_S = 60.0  # a longer idle gap lies between two starts of the run, and is left out
KINDS = ("generate", "score", "train", "grade", "measure", "publish", "load", "save", "replay")
ORDER = ("sampler", "environment", "grader", "teacher", "learner")


@dataclass(frozen=True)
class Piece:
    """A span on its worker's track; seconds since the first one, pauses left out."""

    worker: str
    kind: str
    start: float
    end: float


def pieces(path: Path) -> list[Piece]:
    events = read_trace(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    names, found = dict[int, str](), list[Piece]()
    for event in events:
        if event.get("ph") == "M":
            names[event["tid"]] = event["args"]["name"]
        elif event.get("ph") == "X":
            start = event["ts"] / 1e6
            found.append(Piece(names[event["tid"]], event["name"], start, start + event["dur"] / 1e6))
    return _without_pauses(sorted(found, key=lambda p: p.start))


def _without_pauses(found: list[Piece]) -> list[Piece]:
    shift, latest, out = 0.0, None, []
    for p in found:
        if latest is None:
            shift = latest = p.start
        elif p.start - latest > PAUSE_S:
            shift += p.start - latest
        latest = max(latest, p.end)
        out.append(Piece(p.worker, p.kind, p.start - shift, p.end - shift))
    return out


def drawings(found: list[Piece]) -> list[tuple[str, str]]:
    """(caption, svg) of both pictures; empty if there is no timeline."""
    if not found:
        return []
    out = [("The whole run: the higher a bar, the busier in that moment.", _overview(found))]
    if window := _close(found):
        out.append(
            (f"{CLOSE_STEPS} optimizer steps from close by; what is empty was idle.", _spans(found, *window))
        )
    return out


def idle(found: list[Piece]) -> dict[str, float]:
    """Share of the run in which each worker did nothing but what it does beside its work."""
    if not found:
        return {}
    total = max(p.end for p in found) - min(p.start for p in found)
    busy = defaultdict[str, float](float)
    for p in found:
        busy[p.worker] += p.end - p.start
    return {w: max(0.0, 1 - busy[w] / max(total, 1e-9)) for w in _workers(found) if not is_beside(w)}


def _workers(found: list[Piece]) -> list[str]:
    def place(worker: str) -> tuple[int, str]:
        role = worker.partition("-")[0]
        return (ORDER.index(role) if role in ORDER else len(ORDER), worker)

    return sorted({p.worker for p in found}, key=place)


def _close(found: list[Piece]) -> tuple[float, float] | None:
    """A few steps in the middle of the run, from the end of one to the end of another."""
    ends = [p.end for p in found if p.kind == "train"]
    if len(ends) < 3:
        return None
    size = min(CLOSE_STEPS, len(ends) - 1)
    first = (len(ends) - 1 - size) // 2
    return ends[first], ends[first + size]


def _overview(found: list[Piece]) -> str:
    """Each worker's work by kind, in bins of equal time."""
    last = max(p.end for p in found)
    width = max(last / BINS, 1e-9)
    share: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for p in found:
        for b in range(int(p.start / width), min(BINS - 1, int(p.end / width)) + 1):
            inside = min(p.end, (b + 1) * width) - max(p.start, b * width)
            share[p.worker, p.kind][b] += max(0.0, inside) / width
    rows, unit = [], (WIDTH - LABEL) / BINS
    for row, worker in enumerate(_workers(found)):
        base, below = _top(row) + ROW, defaultdict[int, float](float)
        for kind in KINDS:
            bars = []
            for b, value in sorted(share.get((worker, kind), {}).items()):
                height = ROW * min(value, 1 - below[b])
                if height >= 0.2:
                    y = base - ROW * below[b] - height
                    bars.append(
                        f"M{LABEL + b * unit:.1f} {y:.1f}h{unit + 0.1:.1f}v{height:.1f}h-{unit + 0.1:.1f}z"
                    )
                    below[b] += height / ROW
            if bars:
                rows.append(
                    f'<path class="k-{kind}" d="{"".join(bars)}"><title>{worker}: {kind}</title></path>'
                )
    return _frame(_workers(found), rows, 0.0, last)


def _spans(found: list[Piece], start: float, end: float) -> str:
    workers, scale = _workers(found), (WIDTH - LABEL) / max(end - start, 1e-9)
    inside = [p for p in found if p.end > start and p.start < end]
    longest = sorted(inside, key=lambda p: p.start - p.end)[:MOST_SPANS]
    shapes = []
    for p in longest:
        x, right = LABEL + max(0.0, p.start - start) * scale, LABEL + (min(p.end, end) - start) * scale
        kind = p.kind if p.kind in KINDS else "grade"
        y, wide = _top(workers.index(p.worker)), max(0.8, right - x)
        title = (
            f"<title>{html.escape(p.worker)}: {html.escape(p.kind)}, {1e3 * (p.end - p.start):.0f} ms</title>"
        )
        shapes.append(
            f'<rect class="k-{kind}" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{ROW}" '
            f'rx="1.5">{title}</rect>'
        )
        if wide > 9 * len(p.kind):
            shapes.append(
                f'<text class="on" x="{x + wide / 2:.1f}" y="{y + 15}" text-anchor="middle">{kind}</text>'
            )
    return _frame(workers, shapes, start, end)


def _top(row: int) -> int:
    return row * (ROW + GAP)


def _frame(workers: list[str], shapes: list[str], start: float, end: float) -> str:
    """Tracks, their names and an axis of seconds."""
    bottom = len(workers) * (ROW + GAP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + 22}" role="img" aria-label="timeline">']
    for row, worker in enumerate(workers):
        y = _top(row)
        parts.append(f'<rect class="track" x="{LABEL}" y="{y}" width="{WIDTH - LABEL}" height="{ROW}"/>')
        parts.append(f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{html.escape(worker)}</text>')
    parts += shapes
    step = _round_step((end - start) / 6)
    tick = step * -(-start // step)
    while tick <= end + 1e-9:
        x = LABEL + (tick - start) / max(end - start, 1e-9) * (WIDTH - LABEL)
        anchor = "end" if x > WIDTH - 20 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" '
            f'text-anchor="{anchor}">{_seconds(tick, step)}</text>'
        )
        tick += step
    return "".join([*parts, "</svg>"])


def _round_step(raw: float) -> float:
    steps = [scale * factor for scale in (0.001, 0.01, 0.1, 1) for factor in (1, 2, 5)]
    steps += [10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400]
    return next((step for step in steps if step >= raw), 10 * 86400)


def _seconds(value: float, step: float) -> str:
    """A tick's label. The unit depends only on the step, so all ticks of an axis share it."""
    if step >= 3600:
        return f"{value / 3600:g} h"
    return f"{value / 60:g} min" if step >= 60 else f"{value:.4g} s"


def legend(found: list[Piece]) -> list[str]:
    used = {p.kind for p in found}
    return [kind for kind in KINDS if kind in used]


def of_run(path: Path) -> Record:
    """Everything that the page shows of a run's timeline."""
    found = pieces(path / "trace.json")
    return {"drawings": drawings(found), "legend": legend(found), "idle": idle(found)}
