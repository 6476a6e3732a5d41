#!/usr/bin/env python3
"""Does freshness control pay, where, and how much? The paper's tables at a scale that two CPU cores can run.

    python benchmarks/staleness.py [--quick | --full | --study NAME ...] [--out docs/staleness] [--jobs 2]
        [--seeds N]
    python benchmarks/staleness.py --report     runs nothing: tables, figures and pages from committed rows

Every cell is a whole run of ours (`inline.py`: our conductor with engines, losses and freshness in one
process, on a virtual clock) on a tiny pair, with an exact lag or with lags that mix. Cells that are in
OUT/results.jsonl are not run again, so it can be stopped and restarted at will. Writes table.csv and
table.md, and figures if matplotlib is installed; the headline table comes last. Where OUT is a folder of
docs/staleness, the pages that show its rows are made again, too. docs/staleness.md explains the rows and the
results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import staleness_pages as pages
import staleness_report as report
from staleness_names import CONSTANT, MIXED, SAMPLED, UP_TO
from staleness_text_report import TEXT, text_markdown

RECIPES = Path(__file__).resolve().parent / "recipes"

# Each task has the highest learning rate of 1e-4, 3e-4, 1e-3 at which the synchronous run learns well with
# the cached policy gradient.
TASKS = {
    "short": ["learner.lr=1e-3"],
    "middle": ["learner.lr=3e-4", "learner.steps=120", "eval.every=15"],
    "long": ["learner.lr=3e-4"],
    TEXT: [],  # a real pair, at the rate of docs/real-pair.md; judged by its KL
}
TOYS = [task for task in TASKS if task != TEXT]
LOSSES = {
    "pg_cached": ["loss.support=sampled", "loss.advantage=cached"],
    "pg_ratio": ["loss.support=sampled", "loss.advantage=cached", "loss.importance=true"],
    "pg_recomputed": ["loss.support=sampled", "loss.advantage=recomputed"],
    "reverse_kl": ["loss.kind=reverse_kl", "loss.support=full"],
    "forward_kl": ["loss.kind=forward_kl", "loss.support=full"],
    "jsd": ["loss.kind=jsd", "loss.support=full"],
    "topk": ["loss.support=topk", "teacher.k=8"],
}
# A quarter of all tokens on toys, where that would say nothing new.
ON_TEXT = {**LOSSES, "topk64": ["loss.support=topk", "teacher.k=64"]}
RAW, BEFORE = "freshness.weights=raw", "freshness.pace=null"
PUBLISHED = [
    "freshness.drift=sampled",
    "freshness.anchor=1",
    "freshness.refresh.every_at_least=100",
    RAW,
    BEFORE,
]
CURRENT, ALL = ["freshness.reexecute.labels=current"], "freshness.reexecute.share=1"
PAPER = {
    name: [f"freshness.policy={name}", *PUBLISHED, *labels]
    for names, labels in (
        (("async", "fixed_refresh", "lag_weight"), []),
        (("reweight", "reweight+anchor", "fopd"), CURRENT),
    )
    for name in names
}
OTHERS = {
    "recomputed, ratio": ["freshness.policy=async", "loss.advantage=recomputed", "loss.importance=true"],
    "ratio capped at 2": ["freshness.policy=async", "loss.importance=true", "loss.max_ratio=2"],
    "reweight, scaled step": ["freshness.policy=reweight", "freshness.step_scale=freshness", RAW],
}
# The settings before tuning; the recipe's defaults come from the sweep.
ANCHORED = ["freshness.policy=fopd", "freshness.refresh.mean=0", "freshness.anchor=10", RAW, BEFORE]
TOPK = ["freshness.drift=topk", "freshness.drift_k=8"]
# "fopd, defaults" has a constant anchor of 20 for losses from sampled tokens. It was the default when rows
# were named, and still is up to lag CONSTANT; tables call it "lambda 20" (staleness_names.py).
BEST, DEFAULT = "fopd, top-k anchor", "fopd, defaults"
OURS = {
    "trust": ["freshness.policy=trust", "freshness.trust=0.2"],
    "fopd, quadratic anchor": [*ANCHORED, "freshness.drift=quadratic"],
    BEST: [*ANCHORED, *TOPK],
    DEFAULT: ["freshness.policy=fopd", BEFORE],
}
HEADLINE = {"sync": ["freshness.policy=sync"], **PAPER, **OTHERS, **OURS}
# An anchor that weakens with the lag (freshness/pace.py), by its pace in optimizer steps, with the importance
# ratio on every sample. PACE is the recipe's defaults for policy gradients at lags over CONSTANT. Up to there
# they are DEFAULT, which has an anchor of 20 at every lag; for exact losses, where it has none, always.
PACE = "fopd, pace 64"
WEAKER = (PACE, "fopd, pace 32", "fopd, pace 16")
PACED = {
    f"fopd, pace {n}": ["freshness.policy=fopd", f"freshness.pace={n}", "loss.importance=true"]
    for n in (8, 16, 32, 64, 128, 160)
}
POLICIES = {**HEADLINE, **PACED}
RATES = ("3e-4", "1e-4", "1e-3", "3e-3")
LAMBDAS = ("10", "3", "0.3")  # and 1


@dataclass(frozen=True)
class Cell:
    """One run. `lag` is exact ("8"), mixed ("0..8") or up to a bound ("<=8"); `extra` are further overrides
    of the recipe.
    """

    task: str
    loss: str
    policy: str
    lag: str
    seed: int
    extra: tuple[str, ...] = ()
    optimizer: str = "adamw"

    @property
    def key(self) -> str:
        return "/".join(
            [self.task, self.loss, self.policy, self.lag, str(self.seed), *self.extra, self.optimizer]
        )

    @property
    def overrides(self) -> list[str]:
        if self.lag == MIXED:
            lag = ["schedule.max_lag=8", "schedule.inflight=keep", "sampler.concurrency=96"]
            lag.append("freshness.max_drift=null")
        elif self.lag.startswith(UP_TO):
            lag = [f"schedule.max_lag={self.lag.removeprefix(UP_TO)}", "schedule.inflight=keep"]
        else:
            lag = [f"schedule.lag={self.lag}"]
        own = [*TASKS[self.task], *ON_TEXT[self.loss], *POLICIES[self.policy], *lag, f"seed={self.seed}"]
        return [*own, *self.extra]


def headline(seed: int) -> Iterator[Cell]:
    """Every policy on the most fragile loss at lag 8: the paper's comparison."""
    for policy in HEADLINE:
        yield Cell("short", "pg_cached", policy, "0" if policy == "sync" else "8", seed)


def defaults(seed: int) -> Iterator[Cell]:
    """The claim itself, with few enough runs for ten seeds: the recipe's defaults, beside sync."""
    for task in TOYS:
        yield Cell(task, "pg_cached", "sync", "0", seed)
        yield Cell(task, "pg_cached", DEFAULT, "8", seed)
    yield Cell("short", "pg_cached", DEFAULT, "16", seed)


def lags(seed: int) -> Iterator[Cell]:
    """From which lag on it matters."""
    for lag in ("2", "4", "16"):
        for policy in ("async", "fopd", *OURS):
            yield Cell("short", "pg_cached", policy, lag, seed)


def far(seed: int) -> Iterator[Cell]:
    """Lag 16, for settings that lag 8 does not tell apart."""
    for extra in (
        ("freshness.drift_k=32",),
        ("freshness.drift_k=32", "freshness.anchor=20", "loss.importance=true"),
    ):
        for lag in ("8", "16"):
            yield Cell("short", "pg_cached", BEST, lag, seed, extra)


def losses(seed: int) -> Iterator[Cell]:
    """Which losses need control at all: with none, with an anchor on all of them, and with the recipe's
    defaults.
    """
    for loss in LOSSES:
        if loss != "pg_cached":
            yield Cell("short", loss, "sync", "0", seed)
            for lag in ("2", "4", "8", "16"):
                for policy in ("async", BEST, DEFAULT):
                    yield Cell("short", loss, policy, lag, seed)


def horizons(seed: int) -> Iterator[Cell]:
    """The comparison at longer horizons."""
    for task in ("middle", "long"):
        yield Cell(task, "pg_cached", "sync", "0", seed)
        for policy in ("async", "lag_weight", "fopd", *OURS):
            yield Cell(task, "pg_cached", policy, "8", seed)
        for loss in LOSSES:
            if loss != "pg_cached":
                yield Cell(task, loss, "sync", "0", seed)
                for policy in ("async", DEFAULT):
                    yield Cell(task, loss, policy, "8", seed)
        for loss in ("reverse_kl", "forward_kl"):
            yield Cell(task, loss, BEST, "8", seed)


def beyond(seed: int) -> Iterator[Cell]:
    """Lag 8, 16 and 32 on all tasks: an anchor with a pace beside a constant one."""
    for lag in ("32", "16", "8"):
        for task in TOYS:
            for policy in (PACE, DEFAULT):
                yield Cell(task, "pg_cached", policy, lag, seed)
    for lag in ("32", "16", "8"):
        yield Cell("short", "pg_recomputed", PACE, lag, seed)
    yield Cell("short", "pg_cached", PACE, "4", seed)
    for task in TOYS:
        yield Cell(task, "pg_cached", PACE, f"{UP_TO}8", seed)


def paces(seed: int) -> Iterator[Cell]:
    """How much the pace matters, and what the ratio alone does at lag 2."""
    for lag in ("32", "16", "8", "2"):
        for task in TOYS:
            for n in (16, 32, 128, 160):
                yield Cell(task, "pg_cached", f"fopd, pace {n}", lag, seed)
    for task in TOYS:
        for policy in (PACE, DEFAULT):
            yield Cell(task, "pg_cached", policy, "2", seed)


def mixed(seed: int) -> Iterator[Cell]:
    """Lags 0 to 8 in one batch, as rollouts of uneven duration give: here weights can tell samples apart."""
    for policy in ("async", "lag_weight", "reweight", "reweight+anchor", "fopd", *OURS):
        yield Cell("short", "pg_cached", policy, MIXED, seed)


def sgd(seed: int) -> Iterator[Cell]:
    """The control experiment: plain SGD without clipping does not cancel a factor that a batch shares."""
    for policy in ("sync", "async", "lag_weight", "reweight"):
        lag = "0" if policy == "sync" else "8"
        yield Cell("short", "pg_cached", policy, lag, seed, ("learner.lr=0.03", "learner.clip=0"), "sgd")


SWEEP: dict[str, tuple[str, list[tuple[str, ...]]]] = {
    "anchor, sampled drift": (
        BEST,
        [("freshness.drift=sampled", f"freshness.anchor={x}") for x in (3, 10, 30, 100)],
    ),
    "anchor, quadratic drift": (
        BEST,
        [("freshness.drift=quadratic", f"freshness.anchor={x}") for x in (3, 30)],
    ),
    "anchor, top-k drift": (BEST, [(f"freshness.anchor={x}",) for x in (1, 5, 20, 40)]),
    "k": (BEST, [(f"freshness.drift_k={x}",) for x in (1, 2, 32)]),
    "with the importance ratio": (BEST, [("loss.importance=true",)]),
    "alpha": (BEST, [(f"freshness.alpha={x}",) for x in (0, 0.3, 3, 10)]),
    "xi, as a share of 1/(lag + 1)": (BEST, [(f"freshness.xi={x / 9:.4f}",) for x in (0, 0.5, 0.8)]),
    "weights": (BEST, [("freshness.weights=normalized",)]),
    "step_scale": (BEST, [("freshness.step_scale=freshness",)]),
    "kappa_f (refreshes)": (
        BEST,
        [("freshness.refresh.mean=0.1", f"freshness.refresh.every_at_least={n}") for n in (25, 100)],
    ),
    "trust": ("trust", [(f"freshness.trust={x}",) for x in (0.1, 0.3, 1)]),
}


def sweep(seed: int) -> Iterator[Cell]:
    """One key at a time around our best."""
    for policy, variants in SWEEP.values():
        for extra in variants:
            yield Cell("short", "pg_cached", policy, "8", seed, extra)


def reexecution(seed: int) -> Iterator[Cell]:
    """Supervision drift: how much of a batch to reexecute, what such samples teach, and what D_sup may cost
    them.
    """
    for loss in ("reverse_kl", "forward_kl"):
        for policy in ("async", DEFAULT):
            for extra in (CURRENT, (*CURRENT, ALL)):
                yield Cell("middle", loss, policy, "8", seed, tuple(extra))
        for others in ((), (ALL,), (ALL, "freshness.beta=10"), ("freshness.reexecute.share=0",)):
            yield Cell("middle", loss, DEFAULT, "8", seed, others)


def coverage(seed: int) -> Iterator[Cell]:
    """At every version, half of the questions cannot be looked up: what that costs, and whether dropping the
    buffer for it pays.
    """
    outage = ("task.options.drift=0", "task.options.outage=0.5")
    for policy, lag in (("sync", "0"), ("async", "8"), (DEFAULT, "8")):
        yield Cell("middle", "reverse_kl", policy, lag, seed, outage)
    for kappa in (
        ("freshness.refresh.coverage_sup=0",),
        *(("freshness.refresh.coverage_sup=0.9", f"freshness.refresh.every_at_least={n}") for n in (100, 25)),
    ):
        yield Cell("middle", "reverse_kl", DEFAULT, "8", seed, (*outage, ALL, *kappa))


def anchored_kl(seed: int) -> Iterator[Cell]:
    """What an anchor costs where it is not needed: the default loss at the default depth, and the cached loss
    beside it.
    """
    for lag in ("4", "8"):
        yield Cell("short", "reverse_kl", "async", lag, seed)
        yield Cell("short", "reverse_kl", "reweight", lag, seed)
        for extra in ((), ("freshness.anchor=1",)):
            yield Cell("short", "reverse_kl", BEST, lag, seed, extra)


def weights(seed: int) -> Iterator[Cell]:
    """Whether weights that shrink the whole batch cost anything where their ranking hardly matters."""
    for task in TOYS:
        for loss in ("pg_cached", "reverse_kl", "forward_kl", "jsd", "topk"):
            yield Cell(task, loss, DEFAULT, "8", seed, (RAW,))
    yield Cell("short", "pg_cached", DEFAULT, "16", seed, (RAW,))


def regions(seed: int) -> Iterator[Cell]:
    """Learning rate by lag: where nothing is needed, where the published method helps, where only a strong
    anchor holds, where nothing does.
    """
    parts = (
        ("short", "pg_cached", ("8", "2", "16", "4")),
        ("long", "pg_cached", ("8", "2", "16", "4")),
        ("short", "reverse_kl", ("16", "2", "8", "4")),
        ("long", "reverse_kl", ("16", "2")),
    )
    for rate in RATES:
        for task, loss, lags in parts:
            for lag in lags:
                yield from _place(task, loss, rate, lag, seed)


def border(seed: int) -> Iterator[Cell]:
    """Where async keeps some of its score, or the published method much: to be run with five seeds."""
    for task, rate, lag in (("long", "1e-4", "4"), ("long", "1e-4", "8"), ("short", "3e-4", "8")):
        yield from _place(task, "pg_cached", rate, lag, seed)


def _place(task: str, loss: str, rate: str, lag: str, seed: int) -> Iterator[Cell]:
    """One learning rate and lag of the map: every control, and the synchronous run."""
    own = f"learner.lr={rate}"
    at = () if own == TASKS[task][0] else (own,)
    yield Cell(task, loss, "sync", "0", seed, at)
    yield Cell(task, loss, "async", lag, seed, at)
    today = PACE if loss == "pg_cached" and int(lag) > CONSTANT else DEFAULT
    yield Cell(task, loss, today, lag, seed, at)
    if loss == "pg_cached":
        yield Cell(task, loss, "fopd", lag, seed, at)
        for strength in LAMBDAS:
            yield Cell(task, loss, "fopd", lag, seed, (*at, f"freshness.anchor={strength}"))
        yield Cell(task, loss, "trust", lag, seed, at)


def text(seed: int) -> Iterator[Cell]:
    """The comparison on a real pair; whole for three seeds only where it matters most."""
    exact = ("reverse_kl", "pg_cached")
    for loss in exact:
        yield Cell(TEXT, loss, "sync", "0", seed)
        for policy in ("async", DEFAULT, *(WEAKER if loss == "pg_cached" else ())):
            yield Cell(TEXT, loss, policy, "8", seed)
    for policy in ("lag_weight", "fopd"):
        for loss in exact:
            yield Cell(TEXT, loss, policy, "8", seed)
    yield Cell(TEXT, "pg_cached", "recomputed, ratio", "8", seed)
    for loss in exact:
        for lag in ("16", "4"):
            for policy in ("async", DEFAULT, *(WEAKER if loss == "pg_cached" else ())):
                yield Cell(TEXT, loss, policy, lag, seed)
    for bound in ("8", "4", "2"):
        for policy in ("async", DEFAULT):
            yield Cell(TEXT, "reverse_kl", policy, UP_TO + bound, seed)
    for policy in ("async", PACE):
        yield Cell(TEXT, "pg_cached", policy, f"{UP_TO}8", seed)
    others = [loss for loss in ON_TEXT if loss not in exact and not (seed and loss in SAMPLED)]
    for loss in others:
        yield Cell(TEXT, loss, "sync", "0", seed)
        for policy in ("async", PACE if loss in SAMPLED else DEFAULT):
            yield Cell(TEXT, loss, policy, f"{UP_TO}8", seed)
    if seed:
        return
    for loss in others:
        for policy in ("async", PACE if loss in SAMPLED else DEFAULT):
            yield Cell(TEXT, loss, policy, "8", seed)
    yield Cell(TEXT, "pg_cached", "fopd, pace 8", "8", seed)
    for loss in exact:
        yield from _others(loss, "learner.lr=3e-5")
    yield from _others("reverse_kl", "learner.dtype=fp32", "sampler.dtype=fp32", "teacher.dtype=fp32")


def _others(loss: str, *extra: str) -> Iterator[Cell]:
    """What a lag does to text at other settings."""
    yield Cell(TEXT, loss, "sync", "0", 0, extra)
    for lag in ("4", "8"):
        yield Cell(TEXT, loss, "async", lag, 0, extra)


STUDIES = {
    f.__name__: f
    for f in (
        headline,
        defaults,
        anchored_kl,
        lags,
        far,
        beyond,
        paces,
        horizons,
        losses,
        sweep,
        mixed,
        reexecution,
        coverage,
        sgd,
        weights,
        regions,
        border,
        text,
    )
}
QUICK, FULL = (("headline",), 3), (tuple(set(STUDIES) - {TEXT}), 5)


def settings(sets: Sequence[str], steps: int | None = None) -> tuple[str, ...]:
    """Keys of the recipe for every cell, those of a run that is cut to `steps` included."""
    return (*sets, *(() if steps is None else (f"learner.steps={steps}", f"eval.every={steps}")))


def other_settings(results: Sequence[dict[str, Any]], sets: Sequence[str]) -> str | None:
    """What is wrong if there are rows of other settings: a key does not name them, so a table would compare
    runs that differ in more than it says, and a cell would count as run that was not.
    """

    def keys(pairs: Sequence[str]) -> dict[str, str]:
        return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}

    for r in results:
        if keys(r.get("sets", ())) != keys(sets):
            theirs, yours = (" ".join(pairs) or "none" for pairs in (r.get("sets", ()), sets))
            return (
                f"has rows with other settings (theirs: {theirs}; yours: {yours}), and a row's key does not "
                "name them. Give another --out, or the same --set and --steps."
            )
    return None


def publish(out: Path) -> None:
    """Tables and figures of the rows in a folder; of a folder of the documentation, the pages as well."""
    if out.resolve() in (pages.TOYS, *(pages.TOYS / name for name in pages.TEXTS)):
        pages.write()
        return
    report.write(out, report.read(out / pages.RUNS))
    pages.draw(out)


def measure(cell: Cell, sets: tuple[str, ...] = (), cuda: bool = False) -> dict[str, Any]:
    """Run one cell, with further keys of the recipe that are not part of its name."""
    import torch
    from inline import Inline
    from staleness_text import kl_on_answers

    from fopd_cli.collapse import collapse
    from fopd_cli.recipe import load_recipe

    torch.set_num_threads(1)
    began = time.monotonic()
    recipe = load_recipe(RECIPES / f"{cell.task}.yaml", [*cell.overrides, *sets])
    race = Inline(recipe, uneven=cell.lag == MIXED, sgd=cell.optimizer == "sgd", cuda=cuda)
    before = kl_on_answers(race) if cell.task == TEXT else None
    outcome = race.run()
    on_answers = kl_on_answers(race) if cell.task == TEXT else None
    race.close()
    curve = [(int(e["step"]), float(e["score"])) for e in outcome.evaluations]
    found = collapse(curve, recipe.learner.steps)

    def mean(name: str) -> float:
        return statistics.fmean(s[name] for s in outcome.steps)

    return {
        **asdict(cell),
        "key": cell.key,
        "sets": sets,
        "score": curve[-1][1],
        "peak": found.peak,
        "drop": found.drop,
        "collapsed": found.collapsed,
        "curve": curve,
        "kl": outcome.evaluations[-1]["kl"],
        "kl_curve": [(int(e["step"]), float(e["kl"])) for e in outcome.evaluations],
        "kl_training": statistics.fmean(s["kl"] for s in outcome.steps[-max(1, len(outcome.steps) // 10) :]),
        "kl_on_answers": on_answers,
        "kl_on_answers_at_first": before,
        "length": outcome.evaluations[-1]["response_length"],
        "lag_mean": mean("lag_mean"),
        "lag_max": max(s["lag_max"] for s in outcome.steps),
        "freshness": mean("freshness"),
        "drift_roll": mean("drift_roll"),
        "drift_sup": mean("drift_sup"),
        "refreshes": outcome.refreshes,
        "modelled_seconds": outcome.seconds,
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the headline study, three seeds (the default)")
    parser.add_argument("--full", action="store_true", help="all studies, five seeds: hours")
    parser.add_argument(
        "--report", action="store_true", help="only tables, figures and pages, from the committed rows"
    )
    parser.add_argument("--study", choices=list(STUDIES), action="append", help="these alone")
    parser.add_argument("--seeds", type=int, help="instead of three or five")
    parser.add_argument(
        "--steps", type=int, help="cut every run to so many optimizer steps: for a test, not for figures"
    )
    parser.add_argument("--out", type=Path, default=pages.TOYS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the engines are")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe, for every cell"
    )
    args = parser.parse_args()
    if args.report:
        if not (args.out / pages.RUNS).exists():
            sys.exit(f"{args.out / pages.RUNS} does not exist: --out must be the folder of earlier runs")
        publish(args.out)
        return
    studies, seeds = FULL if args.full else QUICK
    studies, seeds = args.study or studies, args.seeds or seeds
    # Seed by seed, so that a table that was stopped halfway is complete for fewer seeds.
    wanted = {c.key: c for seed in range(seeds) for study in studies for c in STUDIES[study](seed)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / pages.RUNS
    results = {r["key"]: r for r in report.read(path)}
    sets = settings(args.set, args.steps)
    if problem := other_settings(list(results.values()), sets):
        sys.exit(f"{path} {problem}")
    todo = [cell for key, cell in wanted.items() if key not in results]
    context = multiprocessing.get_context("spawn")
    how = (sets, args.device == "cuda")
    reuse = 1 if args.device == "cuda" else 8  # vLLM never gives back all that it takes
    with context.Pool(args.jobs, maxtasksperchild=reuse) as pool, path.open("a") as file:
        pending = pool.imap_unordered(_measure, [(cell, *how) for cell in todo])
        for number, result in enumerate(pending, 1):
            if "error" in result:
                print(
                    f"{number}/{len(todo)}  {result['key']}: {result['error']}", file=sys.stderr, flush=True
                )
                continue
            results[result["key"]] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            found = f"score {result['score']:.3f}, KL {result['kl']:.3f} in {result['wall_seconds']} s"
            print(f"{number}/{len(todo)}  {result['key']}: {found}", flush=True)
    publish(args.out)
    done = [results[key] for key in wanted if key in results]
    shown = report.rows(done)
    if shown:
        print(report.markdown([r for r in shown if r["study"] == "headline"] or shown))
    if text := text_markdown(done):
        print(text)
    if len(done) < len(wanted):
        sys.exit(f"{len(wanted) - len(done)} cells failed")


def _measure(job: tuple[Cell, tuple[str, ...], bool]) -> dict[str, Any]:
    """A cell that fails does not take the others with it."""
    try:
        return measure(*job)
    except Exception as error:
        return {"key": job[0].key, "error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
