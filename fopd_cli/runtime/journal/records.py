"""From a learner's report to what is written down: the only place where metrics are named."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fopd_cli.collapse import collapse
from fopd_cli.engines.text.pieces import pieces as text_pieces
from fopd_cli.runtime.journal.sinks import mean_and_error
from fopd_cli.samples import MOST_PIECES, Rollout, SampleId, SampleStats, StepReport

if TYPE_CHECKING:
    from fopd_cli.runtime.journal.totals import Totals
    from fopd_cli.runtime.scheduling.schedule import Schedule

Likeliest = tuple[np.ndarray, np.ndarray] | None  # ids and probabilities, each (positions, some)
QUANTILES = np.linspace(0, 1, 21)  # of response lengths: fopd plan draws from them
MANY_TRUNCATED = 0.5  # share of responses


def outcome(weight: float) -> Literal["trained", "gated"]:
    """A sample whose weight is 0 was consumed but taught nothing."""
    return "trained" if weight > 0 else "gated"


def step(step: int, report: StepReport, rollouts: list[Rollout], grades: list[float]) -> dict[str, Any]:
    """The record of an optimizer step; nothing in it depends on the clock."""
    s = report.stats
    return {
        "kind": "step",
        "step": step,
        "loss": report.loss,
        "score": _mean(np.array(grades)),
        "kl": _token_mean(s.kl, s.length),
        "entropy": _token_mean(s.entropy, s.length),
        "kl_by_quartile": [_mean(column) for column in s.kl_quartiles.T],
        "student_mass": _mean(s.student_mass),
        "teacher_mass": _mean(s.teacher_mass),
        "clamped": _token_mean(s.clamped, s.length),
        "lag_mean": float(s.lag.mean()),
        "lag_max": int(s.lag.max()),
        "freshness": float(s.freshness.mean()),
        "weight": float(s.weight.mean()),
        "gated": int((s.weight <= 0).sum()),
        "drift_roll": float(s.drift_roll.mean()),
        "drift_sup": float(s.drift_sup.mean()),
        "noise_floor": report.noise_floor,
        "coverage_roll": float(s.coverage_roll.mean()),
        "coverage_sup": float(s.coverage_sup.mean()),
        "anchor": report.anchor,
        "grad_norm": report.grad_norm,
        "clipped": report.clipped,
        "lr": report.lr,
        "skipped": report.skipped,
        "response_length": float(s.length.mean()),
        "length_quantiles": np.quantile(s.length, QUANTILES).round(1).tolist(),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        "versions_per_rollout": float(np.mean([len(r.spans) for r in rollouts])),
        **stale_kv(rollouts),
        **episodes(rollouts),
        "tokens": report.tokens,
        "padding": 1 - report.tokens / max(1, report.padded_tokens),
    }


def stale_kv(rollouts: list[Rollout]) -> dict[str, float]:
    """The share of tokens sampled after an update on keys and values from before it; empty where these are
    always recomputed.
    """
    stale = [r.stale_kv for r in rollouts if r.stale_kv is not None]
    return {"stale_kv": sum(stale) / sum(int(r.loss_mask.sum()) for r in rollouts)} if stale else {}


def ledger(step: int, outcomes: dict[str, Literal["trained", "gated"]]) -> dict[str, Any]:
    """Which of the samples that a step consumed were trained on or gated, by id."""
    ids: dict[str, list[str]] = {"trained": [], "gated": []}
    for sample, what in outcomes.items():
        ids[what].append(sample)
    return {"step": step, **ids}


def evaluation(
    version: int,
    stats: list[SampleStats],
    samples: list[tuple[SampleId, float, Rollout]],
    metrics: list[dict[str, float]],
    sets: Sequence[str | None] = (),
    follow: str | None = None,
) -> dict[str, Any]:
    """The record of an evaluation: task score as mean@k over prompts, KL to the teacher as the mean over
    tokens.

    `samples` come in the order of `stats`. Without grades the score is nan, and KL is the only measure; its
    error is over prompts, too. `sets` names the held-out set of each sample: with several the record is that
    of `follow` (None: the set of the first prompt), and has all of them by name under "sets".
    """
    every = {f.name: np.concatenate([getattr(s, f.name) for s in stats]) for f in fields(SampleStats)}
    by_set: dict[str | None, list[int]] = defaultdict(list)
    for i in sorted(range(len(samples)), key=lambda i: samples[i][0].prompt):
        by_set[sets[i] if sets else None].append(i)
    found = {}
    for name, own in by_set.items():
        own = sorted(own)
        part = SampleStats(**{key: values[own] for key, values in every.items()})
        found[name] = _evaluation(part, [samples[i] for i in own], [metrics[i] for i in own])
    start = {"kind": "eval", "step": version}
    if len(found) == 1:
        return {**start, **next(iter(found.values()))}
    own_set = next(iter(found)) if follow is None else follow
    return {**start, "set": own_set, **found[own_set], "sets": found}


def _evaluation(
    stats: SampleStats, samples: list[tuple[SampleId, float, Rollout]], metrics: list[dict[str, float]]
) -> dict[str, Any]:
    """The metrics of one held-out set."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    kl_by_prompt: dict[int, list[float]] = defaultdict(list)
    for (sample, grade, _), kl in zip(samples, stats.kl, strict=True):
        by_prompt[sample.prompt].append(grade)
        kl_by_prompt[sample.prompt].append(float(kl))
    score, error = mean_and_error(by_prompt.values())
    rollouts = [r for _, _, r in samples]
    return {
        "score": score,
        "score_error": error,
        "prompts": len(by_prompt),
        **mean_metrics(metrics),
        "kl": _token_mean(stats.kl, stats.length),
        "kl_error": mean_and_error(kl_by_prompt.values())[1],
        "forward_kl": _token_mean(stats.forward_kl, stats.length),
        "entropy": _token_mean(stats.entropy, stats.length),
        "kl_by_quartile": [_mean(column) for column in stats.kl_quartiles.T],
        "response_length": float(np.mean([r.response_length for r in rollouts])),
        "truncated": float(np.mean([r.finish == "length" for r in rollouts])),
        **episodes(rollouts),
    }


def evaluation_scalars(record: dict[str, Any]) -> dict[str, float]:
    """For TensorBoard: eval/score, and eval/NAME/score of each held-out set if there are several."""
    flat = {f"eval/{k}": v for k, v in record.items() if isinstance(v, float)}
    for name, own in record.get("sets", {}).items():
        flat |= {f"eval/{name}/{k}": v for k, v in own.items() if isinstance(v, float)}
    return flat


def mean_metrics(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means of the graders' further metrics, each over the samples that have it."""
    names = sorted({name for found in metrics for name in found})
    return {name: _mean(np.array([found.get(name, np.nan) for found in metrics])) for name in names}


def episodes(rollouts: list[Rollout]) -> dict[str, float]:
    """Means over episodes, and the share of calls that could not be completed; empty for single turns."""
    if not any(r.turns for r in rollouts):
        return {}
    calls = [call for r in rollouts for call in r.calls]
    return {
        "turns": float(np.mean([len(r.turns) for r in rollouts])),
        "calls": len(calls) / len(rollouts),
        "invalid_calls": float(np.mean([not call["ok"] for call in calls])) if calls else 0.0,
    }


def tool_seconds(rollouts: list[Rollout]) -> dict[str, float]:
    """Seconds of executed calls, averaged over episodes; kept apart because it depends on the clock."""
    if not any(r.turns for r in rollouts):
        return {}
    return {"tool_seconds": sum(call["seconds"] for r in rollouts for call in r.calls) / len(rollouts)}


def evaluation_line(record: dict[str, Any]) -> str:
    """For people; a score only where there is one."""
    sets = record.get("sets")
    said = (
        _evaluation_line(record)
        if sets is None
        else "; ".join(f"{name}: {_evaluation_line(own)}" for name, own in sets.items())
    )
    return f"held-out at step {record['step']}: {said}"


def _evaluation_line(record: dict[str, Any]) -> str:
    kl = f"KL to the teacher {with_error(record['kl'], record['kl_error'], 4)}"
    if math.isfinite(record["score"]):
        score = with_error(record["score"], record["score_error"], 3)
        metrics = f"score {score} ({record['prompts']} prompts), {kl}"
    else:
        metrics = f"{kl} ({record['prompts']} prompts)"
    cut_off = ""
    if record["truncated"] > MANY_TRUNCATED:
        cut_off = f"; {record['truncated']:.0%} of the responses were cut off at max_new_tokens"
    return metrics + cut_off


def with_error(value: float, error: float, digits: int) -> str:
    """A metric with its standard error, where there is one (a single prompt has none)."""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def scalars(record: dict[str, Any], timing: dict[str, Any]) -> dict[str, float]:
    """For TensorBoard."""
    flat = {f"train/{k}": float(v) for k, v in record.items() if isinstance(v, int | float) and k != "step"}
    flat |= {f"train/kl_quarter_{i}": value for i, value in enumerate(record["kl_by_quartile"], 1)}
    flat |= {f"busy/{role}": share for role, share in timing["busy"].items()}
    flat |= {f"idle/{role}": 1 - share for role, share in timing["busy"].items()}
    for worker, sizes in timing.get("device_bytes", {}).items():
        flat |= {f"device_gb/{worker} {what}": size / 1e9 for what, size in sizes.items()}
    flat |= {f"mfu/{role}": share for role, share in timing.get("mfu", {}).items()}
    names = (
        *("seconds", "gap_seconds", "buffer_samples", "buffer_bytes", "in_flight"),
        *("publish_seconds", "publish_gb_per_s"),
    )
    return flat | {f"runtime/{name}": float(timing[name]) for name in names}


def histograms(stats: SampleStats) -> dict[str, np.ndarray]:
    names = ("freshness", "lag", "weight", "drift_roll", "drift_sup", "length", "loss")
    return {f"samples/{name}": getattr(stats, name) for name in names}


def bar(record: dict[str, Any], timing: dict[str, Any]) -> dict[str, str]:
    """The metrics that matter, for the progress bar."""
    score = {"score": f"{record['score']:.2f}"} if math.isfinite(record["score"]) else {}
    metrics = {
        **score,
        "loss": f"{record['loss']:.4f}",
        "kl": f"{record['kl']:.4f}",
        "lag": f"{record['lag_mean']:.1f}",
        "fresh": f"{record['freshness']:.2f}",
        "tok/s": f"{record['tokens'] / max(timing['seconds'], 1e-9):.0f}",
    }
    busy = timing["busy"]
    metrics["busy"] = "/".join(
        f"{role[0].upper()}{busy[role]:.0%}" for role in ("sampler", "teacher", "learner") if role in busy
    )
    return metrics


def summary(schedule: Schedule, totals: Totals, busy: dict[str, float]) -> dict[str, Any]:
    """summary.json."""
    evaluations = [totals.evaluations[v] for v in sorted(totals.evaluations, key=int)]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    counts = schedule.counts
    curve = [(int(e["step"]), e["score"]) for e in evaluations if np.isfinite(e["score"])]
    found = collapse(curve, schedule.config.steps) if curve else None
    return {
        "steps": schedule.step,
        "score_first": _plain(first.get("score")),
        "score_last": _plain(last.get("score")),
        "score_last_error": _plain(last.get("score_error")),
        "score_peak": None if found is None else found.peak,
        "collapsed": None if found is None else found.collapsed,
        "kl_first": _plain(first.get("kl")),
        "kl_last": _plain(last.get("kl")),
        "kl_last_error": _plain(last.get("kl_error")),
        **_by_set(first, last),
        "max_lag": totals.max_lag,
        "mean_freshness": totals.freshness_sum / max(1, totals.samples),
        "wall_seconds": round(totals.wall_seconds, 3),
        "generated_tokens": totals.generated_tokens,
        "trained_tokens": totals.trained_tokens,
        "skipped_steps": totals.skipped_steps,
        "refreshes": schedule.refreshes,
        "restarts": totals.restarts,
        "prompts": {
            "drawn": counts["drawn"],
            "trained": counts["trained"],
            "gated": counts["gated"],
            "refreshed": counts["refreshed"],
            "in_flight": schedule.in_flight,
        },
        "busy": {role: round(share, 3) for role, share in sorted(busy.items())},
        "advice": advice(busy),
    }


def pieces(
    tokenizer: Any, rollout: Rollout, token_kl: np.ndarray, likeliest: Likeliest = None
) -> list[list[Any]]:
    """[text, KL to the teacher in nats] of the response's first tokens; a tool's tokens have None. With the
    teacher's `likeliest` ids and probabilities at each position, also [[token, probability], ...].
    """
    kls = np.full(rollout.response_length, np.nan)
    kls[rollout.loss_mask] = token_kl
    found: list[list[Any]] = []
    for text, start, stop in text_pieces(tokenizer, rollout.response_ids[:MOST_PIECES]):
        kl = float(kls[start:stop].sum())
        piece: list[Any] = [text, float(f"{kl:.3g}") if math.isfinite(kl) else None]
        if likeliest is not None and math.isfinite(kl):
            ids, probabilities = (array[start].tolist() for array in likeliest)
            named = [str(tokenizer.decode([i])) for i in ids]
            piece.append([[n, round(p, 3)] for n, p in zip(named, probabilities, strict=True)])
        found.append(piece)
    return found


def _by_set(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """The first and last metrics of each held-out set, and which of them is the run's own; empty with one."""
    if "sets" not in last:
        return {}
    found = {}
    for name, own in last["sets"].items():
        begin = first.get("sets", {}).get(name, {})
        found[name] = {
            f"{key}_{when}": _plain(values.get(source))
            for key in ("score", "kl")
            for when, values, source in (
                ("first", begin, key),
                ("last", own, key),
                ("last_error", own, f"{key}_error"),
            )
        }
    return {"set": last["set"], "sets": found}


def advice(busy: dict[str, float]) -> str | None:
    """Where a device would be better used, if some role idles much more than another."""
    shares = {role: busy[role] for role in ("sampler", "teacher", "learner") if role in busy}
    if len(shares) < 3:
        return None
    idle, full = min(shares, key=lambda r: shares[r]), max(shares, key=lambda r: shares[r])
    if shares[full] < 0.7 or shares[idle] > 0.5:
        return None
    return (
        f"{idle} was idle {1 - shares[idle]:.0%} of the time and {full} {1 - shares[full]:.0%}: move a "
        f"device (or threads) from {idle} to {full}"
    )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _token_mean(values: np.ndarray, lengths: np.ndarray) -> float:
    return float((values * lengths).sum() / max(1, lengths.sum()))


def _plain(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
