"""A plan as text for a terminal, and as data for machines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from fopd_cli.outlook import outlook
from fopd_cli.plan.forecast import Forecast
from fopd_cli.plan.lags import LAG_KEY
from fopd_cli.plan.split import Best
from fopd_cli.runtime.journal.pace import readable
from fopd_cli.runtime.memory import model as memory

ROLES = ("sampler", "teacher", "learner")
ARITHMETIC = "by arithmetic, not measured"
SERVER = "a server: taken to answer at once"


def line(found: Forecast) -> str:
    """The plan in one line."""
    o, r = found.outcome, found.recipe
    return (
        f"plan: about {readable(found.seconds)} for {r.learner.steps} steps ({_seconds(o.seconds)} a step, "
        f"{o.tokens_per_second:,.0f} response tokens/s); the {o.bottleneck} is the bottleneck; lag "
        f"{o.lag_mean:.1f}, at most {o.lag_max}; {_basis(found)}"
    )


def text(found: Forecast, best: Best, price: float | None) -> Iterator[str]:
    """The whole plan, line by line."""
    o, r, s = found.outcome, found.recipe, found.setting
    yield f"{_hardware(found)}, {found.plan.mode}; seconds are {_basis(found)}"
    yield f"responses: {_lengths(s.responses)}; prompts: {_lengths(s.prompts.lengths)}"
    yield from _assumptions(found)
    yield ""
    yield from table(
        ["process", "devices", "GB at the peak", "of", "fits", "largest parts, GB (by arithmetic)"],
        list(_memory_rows(found)),
    )
    if not s.hardware.cpu:
        worst = max(found.demands, key=lambda d: d.nbytes)
        verdict = "fits" if found.fits else "does NOT fit with a tenth to spare"
        yield (
            f"the fullest device, {worst.device} ({worst.who}): {worst.nbytes / memory.GB:.1f} of "
            f"{s.hardware.nbytes / memory.GB:.0f} GB: {verdict}"
        )
    if found.plan.exclusive:
        yield f"roles take turns on the devices; {found.plan.describe_turns()}"
    main = memory.total(memory.host(found.plan, found.workers, 0))
    yield f"main memory of all processes, without teacher targets: {main / memory.GB:.1f} GB"
    yield ""
    yield from table(["role", "seconds of a step", "idle", "tokens/s if never idle", ""], list(_roles(found)))
    yield ""
    yield (
        f"a step takes {_seconds(o.seconds)}, evaluations {_seconds(found.evaluation)} each: "
        f"{o.tokens_per_second:,.0f} response tokens a second in training"
    )
    yield f"the bottleneck is the {o.bottleneck} (idle {1 - o.busy[o.bottleneck]:.0%} of a step){_why(found)}"
    yield f"expected lag: {o.lag_mean:.2f} on average, {o.lag_max} at most (the recipe allows {r.max_lag})"
    if (expected := outlook(r)) is not None:
        yield f"  what to expect of it: {expected}"
    cost = "" if price is None else f", {found.price(price):,.2f} at {price:g} an hour and device"
    yield (
        f"{r.learner.steps} steps, {found.evaluations} evaluations: {readable(found.seconds)}, "
        f"{found.tokens / 1e6:,.1f} million response tokens{cost}"
    )
    yield from _best(found, best, price)


def plain(found: Forecast, best: Best, price: float | None) -> dict[str, Any]:
    """The plan as data, in seconds, bytes and tokens."""
    return {
        **_plain(found, price),
        "best": {
            **_plain(best.forecast, price),
            "set": list(best.settings),
            "splits_that_fit": best.splits,
            "simulated": best.simulated,
        },
    }


def _plain(found: Forecast, price: float | None) -> dict[str, Any]:
    o, h = found.outcome, found.setting.hardware
    return {
        "devices": h.count,
        "device": h.name,
        "device_bytes": h.nbytes,
        "placement": found.plan.mode,
        "processes": {role: len(specs) for role, specs in _specs(found).items()},
        "max_lag": found.recipe.max_lag,
        "measured": sorted(found.costs.measured),
        "fits": found.fits or h.cpu,
        "memory": [
            {"process": w.spec.name, "devices": list(w.spec.devices), "bytes": w.use.peak}
            for w in found.workers
        ],
        "demands": [{"device": d.device, "bytes": d.nbytes} for d in found.demands],
        "step_seconds": o.seconds,
        "role_seconds": {role: share * o.seconds for role, share in o.busy.items()},
        "idle": {role: 1 - share for role, share in o.busy.items()},
        "bottleneck": o.bottleneck,
        "tokens_per_second": o.tokens_per_second,
        "lag_mean": o.lag_mean,
        "lag_max": o.lag_max,
        "steps": found.recipe.learner.steps,
        "evaluations": found.evaluations,
        "evaluation_seconds": found.evaluation,
        "seconds": found.seconds,
        "tokens": found.tokens,
        "price": None if price is None else found.price(price),
    }


# ---- parts -------------------------------------------------------------------------------------------------


def _basis(found: Forecast) -> str:
    run, known = found.setting.run, found.costs.measured
    if run is None:
        return ARITHMETIC
    missing = [role for role in ROLES if role not in known]
    rest = f", the {' and '.join(missing)} {ARITHMETIC}" if missing else ""
    return f"measured in {run.path}{rest}"


def _hardware(found: Forecast) -> str:
    h = found.setting.hardware
    return h.name if h.cpu else f"{h.count} x {h.name} of {h.nbytes / memory.GB:.0f} GB"


def _lengths(found: Any) -> str:
    return f"{found.mean:,.0f} tokens on average, {found.most:,} at most ({found.source})"


def _assumptions(found: Forecast) -> Iterator[str]:
    """Assumptions behind the figures that may well be wrong."""
    r = found.recipe
    if found.setting.run is None and getattr(r.task, "max_turns", None) is not None:
        yield "assumed: tools answer at once (--from a run knows their seconds)"
    if found.setting.run is None and found.setting.hardware.cpu:
        yield "assumed: a CPU's rates; small models are far from them (--from a short run is)"
    if r.max_drift is not None and r.max_lag > 0:
        yield (
            f"assumed: the student's drift lets sampling run {_steps(r.max_lag)} ahead "
            "(freshness.max_drift may hold it back)"
        )


def _specs(found: Forecast) -> dict[str, list[Any]]:
    teachers = [spec for ranks in found.plan.teachers for spec in ranks]
    return {"sampler": [*found.plan.samplers], "teacher": teachers, "learner": [*found.plan.learners]}


def _memory_rows(found: Forecast) -> Iterator[list[str]]:
    there = found.setting.hardware.nbytes
    groups: dict[str, list[memory.Worker]] = {}
    for worker in found.workers:
        groups.setdefault(worker.spec.name.rpartition("-")[0], []).append(worker)
    for role in ROLES:
        for name, own in groups.items():
            if own[0].spec.role == role:
                use = max((w.use for w in own), key=lambda u: u.peak)
                devices = " ".join(str(d) for w in own for d in w.spec.devices) or "CPU"
                cache = f"; cache for {use.rows:.0f} samples of full length" if use.rows else ""
                yield [
                    f"{len(own)} x {name}",
                    devices,
                    f"{use.peak / memory.GB:.1f}",
                    f"{there / memory.GB:.0f}" if there else "-",
                    "-" if not there else "yes" if use.peak <= there else "NO",
                    memory.largest(use.parts, 3) + cache,
                ]


def _roles(found: Forecast) -> Iterator[list[str]]:
    o = found.outcome
    served = not found.setting.models.teachers
    for role in ROLES:
        share = o.busy[role]
        known = "measured" if role in found.costs.measured else ARITHMETIC
        rate = f"{o.tokens / (share * o.seconds):,.0f}" if share > 0 else "-"
        note = SERVER if role == "teacher" and served and "teacher" not in found.costs.measured else known
        yield [role, _seconds(share * o.seconds), f"{1 - share:.0%}", rate, note]


def _why(found: Forecast) -> str:
    if found.recipe.max_lag == 0:
        return "; roles wait for each other, because the recipe allows no lag"
    if found.plan.exclusive:
        return "; roles take turns on the devices"
    return ""


def _best(found: Forecast, best: Best, price: float | None) -> Iterator[str]:
    cpu = found.setting.hardware.cpu
    looked = f"{best.simulated} simulated" if cpu else f"{best.splits} splits fit, {best.simulated} simulated"
    if not cpu and not best.splits:
        yield "best split: none of the splits that were looked at fits; take more or larger devices"
        return
    if not best.settings:
        yield f"best split: the recipe's own ({looked})"
        return
    f, before = best.forecast, found.outcome.seconds
    count = {role: len(specs) for role, specs in _specs(f).items()}
    where = "" if cpu else f"{f.plan.mode}, " + ", ".join(f"{n} {role}" for role, n in count.items()) + ", "
    cost = "" if price is None else f", {f.price(price):,.2f}"
    yield (
        f"best split: {where}lag at most {f.recipe.max_lag}: {_seconds(f.outcome.seconds)} a step instead of "
        f"{_seconds(before)}, {readable(f.seconds)} in all{cost}; the {f.outcome.bottleneck} is idle least "
        f"({looked})"
    )
    yield "  " + " ".join(f"--set {s}" for s in best.settings)
    if any(s.startswith(f"schedule.{LAG_KEY}=") for s in best.settings) and (expected := outlook(f.recipe)):
        yield f"  what to expect of its lag: {expected}"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:,.1f} s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, with numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = (
            cell.rjust(width) if re.match(r"[\d,.]+( m?s|%)?$", cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
