"""Costs as a run has measured them, from its timeline and its records.

A span says how long an action took and how much work it was. Other engines that computed at the same time
slowed it down by a known rule (`contention.py`); without that slowdown, a span is the action's cost. Straight
lines are fitted through the spans, held near the arithmetic where the spans cannot tell. A plan then scales
its own arithmetic by measured over arithmetic of the run, which covers other devices, lengths and batches.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from fopd_cli.errors import UserError
from fopd_cli.names import beside
from fopd_cli.plan.contention import Contention, places, usual_spread
from fopd_cli.plan.cost import Call, Costs, Decoding
from fopd_cli.recipe import Recipe
from fopd_cli.report.reading import Record
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.trace import read_trace
from fopd_cli.runtime.placement import Plan, from_plain

COMPUTING = ("generate", "score", "train", "publish", "measure")
NEAR = 1e-3  # how strongly a fitted line is held to the arithmetic
SPREADS = tuple(i / 10 for i in range(11))
TELLS = 0.9  # another spread must reduce the error of the fit to this share
EARLY = 0.25  # quantile of the gaps that is taken to contain no waiting


def placement(run: Path) -> tuple[Plan, int]:
    """The run's workers and cores. Raises `UserError` if it has not recorded them."""
    path = RunDir(run).placement
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return from_plain(found["plan"]), int(found["cores"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--from: {run} does not say where its workers ran (no sound {path.name}): it was made by an "
            "older fopd, or ended before its first step; take another run"
        ) from None


# ---- spans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Something that a worker did; `seconds` excludes the slowdown by other engines."""

    engine: Engine
    kind: str
    start: float
    end: float
    args: Mapping[str, Any]
    seconds: float = 0.0


def spans(run: Path, plan: Plan) -> list[Span]:
    """Ordered by start, without the first optimizer step, which includes one-time work."""
    try:
        events = read_trace((run / "trace.json").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        events = []
    engines = {spec.name: Engine.of(spec) for spec in plan.everyone}
    engines |= {beside(spec.name, "publisher"): Engine.of(spec) for spec in plan.learners}
    names = {e["tid"]: e["args"]["name"] for e in events if e.get("ph") == "M"}
    found = [
        Span(
            engines[names[e["tid"]]],
            str(e["name"]),
            e["ts"] / 1e6,
            (e["ts"] + e["dur"]) / 1e6,
            e.get("args", {}),
        )
        for e in events
        if e.get("ph") == "X" and names.get(e["tid"]) in engines
    ]
    found.sort(key=lambda s: s.start)
    first = min((s.end for s in found if s.kind == "train"), default=0.0)
    found = [s for s in found if s.start >= first]
    if sum(s.kind == "train" for s in found) < 3:
        raise UserError(
            f"--from: {run} has made too few optimizer steps to learn from (trace.json holds "
            f"{sum(s.kind == 'train' for s in found)} after the first); take a run of at least 4"
        )
    return found


def undisturbed(found: Sequence[Span], contention: Contention, delays: Sequence[float]) -> list[Span]:
    """The spans with the seconds that each would have taken on its own."""
    edges: list[tuple[float, int, Engine, int]] = []  # time, which count, whose, its change
    for s in found:
        if s.kind in COMPUTING:
            asleep = _waits(s, delays)
            edges += [(s.start, 0, s.engine, 1), (s.end, 0, s.engine, -1)]
            if asleep:
                edges += [(s.end - asleep, 1, s.engine, 1), (s.end, 1, s.engine, -1)]
    edges.sort(key=lambda edge: edge[0])
    counts: tuple[dict[Engine, int], dict[Engine, int]] = (defaultdict(int), defaultdict(int))
    times, rates = [], []
    for time, changed in itertools.groupby(edges, key=lambda edge: edge[0]):
        for _, which, engine, by in changed:
            counts[which][engine] += by
        working, asleep_ones = ([e for e, n in count.items() if n > 0] for count in counts)
        times.append(time)
        rates.append(contention.rates(working, asleep_ones))
    return [replace(s, seconds=_alone(s, times, rates, _waits(s, delays))) for s in found]


def _waits(span: Span, delays: Sequence[float]) -> float:
    """Seconds at the end of a span in which a teacher only waits."""
    if span.kind != "score":
        return 0.0
    return min(span.end - span.start, delays[span.engine.index] * float(span.args.get("samples", 0)))


def _alone(
    span: Span, times: Sequence[float], rates: Sequence[Mapping[Engine, float]], waits: float
) -> float:
    end, seconds = span.end - waits, 0.0
    i = max(0, bisect.bisect_right(times, span.start) - 1)
    at = span.start
    while at < end:
        until = min(end, times[i + 1]) if i + 1 < len(times) else end
        seconds += (until - at) * (rates[i].get(span.engine, 1.0) if times else 1.0)
        at, i = until, i + 1
    return seconds


# ---- lines through spans -----------------------------------------------------------------------------------


def fitted(work: Sequence[Sequence[float]], seconds: Sequence[float], guess: Sequence[float]) -> np.ndarray:
    """Seconds of each kind of work, by non-negative least squares. The fit is held to the proportions of
    `guess` where the rows of `work` cannot tell, and leaves out outliers.
    """
    x, y, prior = (np.array(v, dtype=float) for v in (work, seconds, guess))
    prior = np.where(prior > 0, prior, 1e-9)
    kept = np.ones(len(y), dtype=bool)
    found = prior
    for _ in range(3):
        found = _held(x[kept], y[kept], prior)
        off = np.abs(x @ found - y)
        kept = off <= 4 * np.median(off[kept]) + 0.02 * y
    return found


def _held(x: np.ndarray, y: np.ndarray, prior: np.ndarray) -> np.ndarray:
    whole = x @ prior
    prior = prior * (whole @ y) / max(1e-30, whole @ whole)
    size = np.sqrt(np.mean(y * y) * len(y)) or 1.0
    a = np.vstack([x * prior / size, np.sqrt(NEAR) * np.eye(len(prior))])
    b = np.concatenate([y / size, np.full(len(prior), np.sqrt(NEAR))])
    best, least = np.ones(len(prior)), np.inf
    for chosen in itertools.product((False, True), repeat=len(prior)):  # which ones are not 0
        z, mask = np.zeros(len(prior)), np.array(chosen)
        if mask.any():
            z[mask] = np.linalg.lstsq(a[:, mask], b, rcond=None)[0]
        if (z >= 0).all() and (off := float(np.sum((a @ z - b) ** 2))) < least:
            best, least = z, off
    return best * prior


def off(work: Sequence[Sequence[float]], seconds: Sequence[float], found: np.ndarray) -> float:
    """How far spans are from the line, relative to their mean; the farthest tenth is ignored."""
    y = np.array(seconds)
    far = np.sort(np.abs(np.array(work) @ found - y))
    return float(far[: max(1, int(0.9 * len(far)))].mean() / max(1e-12, y.mean()))


@dataclass
class _Measured:
    """Measured costs, and how far off they are (`off`)."""

    costs: Costs
    off: float


def measured(
    found: Sequence[Span],
    guess: Costs,
    plan: Plan,
    delays: Sequence[float],
    cores: int,
    conductor: float | None = None,
) -> Costs:
    """The costs that explain a run's spans best; `guess` is the arithmetic for that run. `conductor`: CPU
    seconds per step of the conductor's process, if known.
    """
    remote = [i for i, costs in enumerate(guess.scoring) if costs == Call(0.0, 0.0)]
    best: _Measured | None = None
    usual = usual_spread(plan)
    for spread in (usual, *SPREADS) if plan.mode == "cpu" else (usual,):
        contention = Contention(places(plan, remote), cores, spread)
        tried = _lines(undisturbed(found, contention, delays), guess, plan)
        if best is None or tried.off < TELLS * best.off:
            best = _Measured(replace(tried.costs, spread=spread), tried.off)
    assert best is not None
    if conductor is None:
        return best.costs
    left = max(0.0, conductor - best.costs.bookkeeping)
    scale = left / max(1e-12, guess.message * _answers(found) + guess.sample * _samples(found))
    return replace(best.costs, message=scale * guess.message, sample=scale * guess.sample)


def _answers(found: Sequence[Span]) -> float:
    """How many answers the conductor gets per step; samplers send about as many as the grader."""
    counts = Counter(s.kind for s in found)
    sampled = max(counts["grade"], counts["generate"])
    rest = sum(counts[kind] for kind in ("grade", "score", "load", "train"))
    return (sampled + rest) / counts["train"]


def _samples(found: Sequence[Span]) -> float:
    """How many samples were judged per step."""
    judged = sum(int(s.args.get("samples", 0)) for s in found if s.kind == "score")
    return judged / sum(s.kind == "train" for s in found)


def conductor_seconds(steps: Sequence[Record]) -> float | None:
    """The conductor's CPU seconds per optimizer step, without the first two steps, which include startup."""
    found = [r["timing"]["conductor_seconds"] for r in steps[2:] if "conductor_seconds" in r["timing"]]
    return median(found) if found else None


def _lines(found: Sequence[Span], guess: Costs, plan: Plan) -> _Measured:
    kinds: dict[str, list[Span]] = defaultdict(list)
    for span in found:
        kinds[span.kind].append(span)
    costs, far, known = guess, [], set()
    d = guess.decoding
    if sampled := [s for s in kinds["generate"] if s.args.get("passes")]:
        names = ("passes", "rows", "prompt_tokens", "joins", "exchanges")
        line = _Line(sampled, lambda s: [s.args.get(n, 0) for n in names], _parts(d))
        step, row, prompt, join, exchange = line.found.tolist()
        decoding = replace(d, step=step, row=row, prompt_token=prompt, join=join, exchange=exchange)
        costs = replace(costs, decoding=decoding)
        far.append(line.off)
        known.add("sampler")
    scoring = list(guess.scoring)
    for i, arithmetic in enumerate(guess.scoring):
        if scored := [s for s in kinds["score"] if s.engine.index == i and s.args.get("tokens")]:
            line = _Line(scored, lambda s: [1, s.args["tokens"]], [arithmetic.call, arithmetic.token])
            scoring[i] = Call(*line.found.tolist())
            far.append(line.off)
            known.add("teacher")
    ranks = len(plan.learners)
    t = guess.training
    line = _Line(kinds["train"], lambda s: [1, s.args["tokens"] / ranks], [t.call, t.token])
    far.append(line.off)
    training = Call(*line.found.tolist())
    scale = training.token / t.token
    measuring = Call(guess.measuring.call * scale, guess.measuring.token * scale)
    costs = replace(
        costs,
        scoring=tuple(scoring),
        training=training,
        measuring=measuring,
        publish=_middle(kinds["publish"], guess.publish),
        decoding=replace(costs.decoding, load=_middle(kinds["load"], d.load)),
        save=_middle(kinds["save"], guess.save),
        grade=_per_sample(kinds["grade"]),
        bookkeeping=_bookkeeping(kinds),
        measured=frozenset({*known, "learner"}),
    )
    return _Measured(costs, fmean(far))


def _parts(d: Decoding) -> list[float]:
    return [d.step, d.row, d.prompt_token, d.join, d.exchange]


class _Line:
    def __init__(
        self, spans: Sequence[Span], work: Callable[[Span], Sequence[float]], guess: Sequence[float]
    ) -> None:
        rows, seconds = [work(s) for s in spans], [s.seconds for s in spans]
        self.found = fitted(rows, seconds, guess)
        self.off = off(rows, seconds, self.found)


def _middle(found: Sequence[Span], otherwise: float) -> float:
    return median(s.end - s.start for s in found) if found else otherwise


def _per_sample(found: Sequence[Span]) -> float:
    samples = sum(int(s.args.get("samples", 0)) for s in found)
    return sum(s.end - s.start for s in found) / samples if samples else 0.0


def _bookkeeping(kinds: Mapping[str, Sequence[Span]]) -> float:
    """The conductor's seconds after a step: from the end of publication to a sampler's update, in steps in
    which the update waited for nothing else.
    """
    published = {int(s.args.get("version", -1)): s.end for s in kinds["publish"]}
    gaps = [
        s.start - published[version]
        for s in kinds["load"]
        if (version := int(s.args.get("version", -1))) in published
    ]
    return max(0.0, float(np.quantile(gaps, EARLY))) if gaps else 0.0


# ---- onto another plan -------------------------------------------------------------------------------------


def carried_over(run: Costs, guess: Costs, target: Costs) -> Costs:
    """The arithmetic for the plan (`target`), times measured over arithmetic for the run."""

    def one(m: float, g: float, t: float) -> float:
        return t * m / g if g > 0 and t > 0 else m

    def call(m: Call, g: Call, t: Call) -> Call:
        return Call(one(m.call, g.call, t.call), one(m.token, g.token, t.token))

    def decoding(m: Decoding, g: Decoding, t: Decoding) -> Decoding:
        return replace(
            t,
            step=one(m.step, g.step, t.step),
            row=one(m.row, g.row, t.row),
            prompt_token=one(m.prompt_token, g.prompt_token, t.prompt_token),
            load=one(m.load, g.load, t.load),
            join=one(m.join, g.join, t.join),
            exchange=one(m.exchange, g.exchange, t.exchange),
        )

    same = len(run.scoring) == len(target.scoring)
    return replace(
        run,
        decoding=decoding(run.decoding, guess.decoding, target.decoding),
        scoring=tuple(map(call, run.scoring, guess.scoring, target.scoring)) if same else target.scoring,
        training=call(run.training, guess.training, target.training),
        measuring=call(run.measuring, guess.measuring, target.measuring),
        publish=one(run.publish, guess.publish, target.publish),
        turn=target.turn,
        measured=run.measured if same else run.measured - {"teacher"},
    )


def tool_seconds(steps: Sequence[Record]) -> float:
    """Mean tool seconds per episode; 0 if nothing calls tools."""
    found = [float(r["timing"].get("tool_seconds") or 0.0) for r in steps if r.get("timing")]
    return fmean(found) if found else 0.0


def delays_of(recipe: Recipe) -> list[float]:
    """Seconds per sample that each teacher waits, to simulate a slow one."""
    return [t.delay_ms / 1000 for t in recipe.teachers]
