"""The tables of docs/staleness.md and docs/staleness-details.md, each from the rows of
`staleness_report.rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from staleness_names import (
    CACHED,
    CONSTANT,
    CONSTANT_ANCHOR,
    LOSSES,
    MIXED,
    PUBLISHED,
    SAMPLED,
    WEAKENING,
    label,
    rank,
)
from staleness_report import TASKS, Result, Row, equal_time, rows

EXACT = tuple(loss for loss in LOSSES if loss not in SAMPLED)
TOP8 = "fopd, top-k anchor"
LAGS = ("2", "4", "8", "16")
NONE = "-"


class Found:
    """Rows by what they are of."""

    def __init__(self, found: Iterable[Row]) -> None:
        self._rows = {
            (r["task"], r["loss"], r["policy"], r["lag"], r["overrides"]): r
            for r in found
            if r["optimizer"] == "adamw"
        }

    def __call__(self, task: str, loss: str, policy: str, lag: str, *overrides: str) -> Row | None:
        return self._rows.get((task, loss, policy, lag, " ".join(overrides)))

    def of(self, task: str, loss: str) -> list[Row]:
        return [r for key, r in self._rows.items() if key[:2] == (task, loss)]

    def today(self, task: str, loss: str, lag: str) -> tuple[Row | None, str]:
        """What a user gets, or an asterisk and the constant anchor where only that was run."""
        if loss not in SAMPLED or int(lag) <= CONSTANT:
            return self(task, loss, CONSTANT_ANCHOR, lag), ""
        row = self(task, loss, WEAKENING, lag)
        return (row, "") if row else (self(task, loss, CONSTANT_ANCHOR, lag), "*")


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def share(row: Row | None) -> str:
    return NONE if row is None else f"{row['of_sync']:.0%}"


def score(row: Row | None, digits: int = 3) -> str:
    """With its standard error, and the runs that collapsed, if any did."""
    if row is None:
        return NONE
    error = "" if math.isnan(row["error"]) else f" ± {row['error']:.{digits}f}"
    return f"{row['score']:.{digits}f}{error}{_lost(row)}"


def _lost(row: Row) -> str:
    return f", {row['collapsed']}/{row['seeds']} collapsed" if row["collapsed"] else ""


def span(found: Iterable[Row | None]) -> str:
    """The lowest and the highest share of some rows."""
    shares = [r["of_sync"] for r in found if r is not None]
    if not shares:
        return NONE
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low.removesuffix('%')} to {high}"


def rule(found: Found) -> str:
    """Which policy for a loss and a lag, and what it kept."""

    def kept(policy: str, lag: str) -> list[str]:
        return [share(found(task, CACHED, policy, lag)) for task in TASKS]

    def free(lag: str) -> str:
        shares = kept("async", lag)
        return "not run" if set(shares) == {NONE} else ", ".join(shares).replace(NONE, "not run")

    def exact(policy: str) -> list[str]:
        lags = {"short": LAGS}
        return [
            span(found(task, loss, policy, lag) for loss in EXACT for lag in lags.get(task, ("8",)))
            for task in TASKS
        ]

    heads = ("your loss", "lag", "take", "short task", "middle", "long", "async: short, middle, long")
    full, sampled = "exact: full vocabulary or top-k and tail", "policy gradient from sampled tokens"
    return table(
        heads,
        [
            (
                full,
                "2 to 16 (middle, long: 8)",
                "the defaults, or async",
                *exact(CONSTANT_ANCHOR),
                ", ".join(exact("async")),
            ),
            (sampled, "2", "the defaults: lambda 20 (up to lag 3)", *kept(CONSTANT_ANCHOR, "2"), free("2")),
            ("", "8", "the defaults: pace 64 (beyond lag 3)", *kept(WEAKENING, "8"), free("8")),
            ("", "16", "the same", *kept(WEAKENING, "16"), free("16")),
            ("", "32", "the same", *kept(WEAKENING, "32"), free("32")),
            ("", "8", "no lambda to set: `trust`", *kept("trust", "8"), free("8")),
        ],
    )


def by_lag(found: Found) -> str:
    """The cached policy gradient on the short task: shares of sync."""
    lags = (*LAGS, "32")
    policies = ("async", PUBLISHED, "trust", "fopd, quadratic anchor", TOP8, CONSTANT_ANCHOR, WEAKENING)

    def cell(policy: str, lag: str) -> str:
        row = found("short", CACHED, policy, lag)
        return NONE if row is None else f"{share(row)}{_lost(row)} ({row['seeds']})"

    named = {CONSTANT_ANCHOR: "lambda 20: defaults up to lag 3", WEAKENING: "pace 64: defaults beyond"}
    lines = [(named.get(p, label(p, CACHED, "8")), *(cell(p, lag) for lag in lags)) for p in policies]
    return table(("short task, of sync (seeds)", *(f"lag {lag}" for lag in lags)), lines)


def by_loss(found: Found) -> str:
    """Async and today's defaults, as shares of sync."""

    def cell(task: str, loss: str, lag: str) -> str:
        today, star = found.today(task, loss, lag)
        return f"{share(found(task, loss, 'async', lag))} / {share(today)}{star}"

    places = [("short", lag) for lag in LAGS] + [("middle", "8"), ("long", "8")]
    lines = [(name, *(cell(task, loss, lag) for task, lag in places)) for loss, name in LOSSES.items()]
    return table(("async / defaults, of sync", *(f"{task}, lag {lag}" for task, lag in places)), lines)


def paper_point(found: Found) -> str:
    """The long task at 1e-4, lag 4 and 8."""
    at = "learner.lr=1e-4"
    lines = [("sync", *_scored(found("long", CACHED, "sync", "0", at)), NONE, NONE)]
    for policy, name, extra in (
        ("async", "async", ()),
        *(
            (PUBLISHED, f"f-OPD as published, lambda {x}", () if x == "1" else (f"freshness.anchor={x}",))
            for x in ("0.3", "1", "3", "10")
        ),
        ("trust", "trust, 0.2 nats", ()),
        (WEAKENING, "**pace 64 (defaults)**", ()),
    ):
        both = [found("long", CACHED, policy, lag, at, *extra) for lag in ("4", "8")]
        lines.append((name, *_scored(both[0]), *_scored(both[1])))
    return table(("long task, 1e-4", "lag 4 (seeds)", "of sync", "lag 8 (seeds)", "of sync"), lines)


def _scored(row: Row | None) -> tuple[str, str]:
    return (NONE, NONE) if row is None else (f"{score(row)} ({row['seeds']})", share(row))


def throughput(found: Found) -> str:
    """Optimizer steps a second at lag 8 by the cost model, as multiples of sync's; and of async's."""

    def line(loss: str, policy: str, name: str) -> list[str]:
        cells = []
        for task in TASKS:
            own, free = found(task, loss, policy, "8"), found(task, loss, "async", "8")
            if own is None or free is None:
                cells.append(NONE)
            else:
                of_async = own["throughput"] / free["throughput"]
                cells.append(f"{own['throughput']:.2f} ({of_async:.0%} of async's {free['throughput']:.2f})")
        return [LOSSES[loss], name, *cells]

    lines = [line(CACHED, CONSTANT_ANCHOR, "lambda 20"), line(CACHED, WEAKENING, "pace 64 (defaults)")]
    lines += [line(loss, CONSTANT_ANCHOR, "defaults") for loss in EXACT]
    return table(("loss", "policy", *(f"{task} task" for task in TASKS)), lines)


def headline(found: Found, results: Sequence[Result]) -> str:
    """Every policy at lag 8, cached policy gradient, short task."""
    own = [r for r in found.of("short", CACHED) if r["study"] == "headline"]
    at_end = {policy: score_ for policy, _, score_ in equal_time(results)}
    heads = ["policy", "score", "of sync", "of its gain", "KL", "collapsed", "steps to 90% of sync"]
    heads += ["throughput", "score when async ends"]
    lines = [
        (
            r["name"],
            f"{r['score']:.3f} ± {r['error']:.3f}",
            share(r),
            f"{r['of_gain']:.0%}",
            f"{r['kl']:.2f}",
            f"{r['collapsed']}/{r['seeds']}",
            "never" if math.isinf(r["steps_to_90"]) else f"{r['steps_to_90']:.0f}",
            f"{r['throughput']:.2f}",
            f"{at_end[r['policy']]:.3f}",
        )
        for r in sorted(own, key=lambda r: (r["lag"] != "0", rank(r["policy"])))
    ]
    return table(heads, lines)


def anchors(found: Found) -> str:
    """Final score by estimator and lambda, lag 8."""
    strengths = ("1", "3", "5", "10", "20", "30", "40", "100")

    def cell(drift: str, strength: str) -> str:
        extra = [] if drift == "topk" else [f"freshness.drift={drift}"]
        extra += [] if (drift, strength) == ("topk", "10") else [f"freshness.anchor={strength}"]
        row = found("short", CACHED, TOP8, "8", *extra)
        if (drift, strength) == ("quadratic", "10"):
            row = found("short", CACHED, "fopd, quadratic anchor", "8")
        if (drift, strength) == ("sampled", "1"):
            row = found("short", CACHED, PUBLISHED, "8")
        return NONE if row is None else f"{row['score']:.2f}"

    gradients = {
        "sampled": ("sampled: rho log rho - rho + 1", "rho log rho, to 0 as rho goes to 0"),
        "quadratic": ("quadratic: (log rho)^2 / 2", "log rho"),
        "topk": ("top-8 and a tail", "that of the KL itself"),
    }
    lines = [(*said, *(cell(drift, x) for x in strengths)) for drift, said in gradients.items()]
    heads = ("drift as anchor", "gradient by log pi_t(y)", "lambda 1", *strengths[1:])
    return table(heads, lines)


def losses(found: Found) -> str:
    """Scores by loss and lag: async, an anchor on any loss, and the constant anchor or none."""

    def cell(loss: str, lag: str) -> str:
        three = [found("short", loss, policy, lag) for policy in ("async", TOP8, CONSTANT_ANCHOR)]
        return " / ".join(NONE if r is None else f"{r['score']:.2f}{_lost(r)}" for r in three)

    lines = []
    for loss, name in LOSSES.items():
        sync = found("short", loss, "sync", "0")
        base = NONE if sync is None else f"{sync['score']:.2f}"
        lines.append((name, base, *(cell(loss, lag) for lag in LAGS)))
    return table(("short task", "sync", *(f"lag {lag}" for lag in LAGS)), lines)


def horizons(found: Found) -> str:
    """Scores at lag 8 on the longer tasks."""
    tasks = ("middle", "long")
    policies = [("sync", "0"), ("async", "8"), (CONSTANT_ANCHOR, "8"), (WEAKENING, "8")]
    heads = ("sync", "async", "lambda 20; exact: defaults", "pace 64 (defaults)")
    lines = [
        (name, *(score(found(task, loss, policy, lag)) for task in tasks for policy, lag in policies))
        for loss, name in LOSSES.items()
    ]
    return table(("lag 8", *(f"{task}: {head}" for task in tasks for head in heads)), lines)


def seed_spread(found: Found, task: str) -> float:
    """Standard deviation of a score from seed to seed, pooled over sync and all anchored runs of the cached
    loss.
    """
    own = [
        r
        for r in found.of(task, CACHED)
        if not r["overrides"] and r["seeds"] > 1 and not r["collapsed"] and r["lag"] != MIXED
        if r["policy"] in ("sync", TOP8, CONSTANT_ANCHOR) or r["policy"].startswith("fopd, pace")
    ]
    squares = sum((r["seeds"] - 1) * r["seeds"] * r["error"] ** 2 for r in own)
    return math.sqrt(squares / sum(r["seeds"] - 1 for r in own))


def strength(found: Found) -> str:
    """Anchors at lag 2 to 32 on all tasks, cached policy gradient."""
    spread = {task: seed_spread(found, task) for task in TASKS}

    def cell(task: str, policy: str, lag: str) -> str:
        row = found(task, CACHED, policy, lag)
        if row is None:
            return NONE
        error = spread[task] / math.sqrt(row["seeds"])
        return f"{row['score']:.3f} ± {error:.3f} ({share(row)}; {row['seeds']})"

    lines = []
    for lag in ("2", "4", "8", "16", "32"):
        for policy in (
            CONSTANT_ANCHOR,
            "fopd, pace 160",
            "fopd, pace 128",
            WEAKENING,
            "fopd, pace 32",
            "fopd, pace 16",
        ):
            cells = [cell(task, policy, lag) for task in TASKS]
            if set(cells) != {NONE}:
                lines.append((label(policy, CACHED, lag), lag, *cells))
    said = ", ".join(f"{spread[task]:.3f} ({task})" for task in TASKS)
    return f"{table(('', 'lag', *TASKS), lines)}\n\nFrom seed to seed these scores differ by {said}."


def ideas(found: Found) -> str:
    """What was tried against long lags besides a pace, cached policy gradient; none of it was built."""
    ratio = "loss.importance=true"
    tried = (
        ("pace 64 (defaults)", WEAKENING, ()),
        (
            "anchor to a moving average (8 versions), lambda 8, ratio",
            CONSTANT_ANCHOR,
            (ratio, "freshness.anchor=8", "@average=8"),
        ),
        ("lambda holds D_roll at 0.01, ratio", CONSTANT_ANCHOR, (ratio, "@dual=0.01")),
        ("lambda holds D_roll at 0.03, ratio", CONSTANT_ANCHOR, (ratio, "@dual=0.03")),
        ("trust, 0.2 nats, and pace 64", WEAKENING, ("@trust=0.2",)),
        ("learning rate falls as D_roll passes 0.01", "async", ("@lr_drift=0.01",)),
        ("the same with the ratio", "async", (ratio, "@lr_drift=0.01")),
    )

    def cell(task: str, policy: str, lag: str, extra: Sequence[str]) -> str:
        row = found(task, CACHED, policy, lag, *extra)
        return NONE if row is None else f"{row['score']:.3f} ({share(row)}; {row['seeds']})"

    places = [(task, lag) for lag in ("2", "16", "32") for task in TASKS]
    heads = ("", *(f"{task}, lag {lag}" for task, lag in places))
    return table(heads, [(name, *(cell(t, p, lag, e) for t, lag in places)) for name, p, e in tried])


def supervision(found: Found) -> str:
    """Drifting labels, middle task, lag 8."""
    current, whole = "freshness.reexecute.labels=current", "freshness.reexecute.share=1"
    lines = []
    for reexecuted, labels, policy, extra in (
        ("nothing", "", "async", ()),
        ("nothing", "", CONSTANT_ANCHOR, ("freshness.reexecute.share=0",)),
        ("an eighth of a batch", "current", "async", (current,)),
        ("an eighth", "current", CONSTANT_ANCHOR, (current,)),
        ("an eighth", "cached", CONSTANT_ANCHOR, ()),
        ("all", "current", "async", (current, whole)),
        ("all", "current", CONSTANT_ANCHOR, (current, whole)),
        ("all", "cached", CONSTANT_ANCHOR, (whole,)),
        ("all", "cached, beta 10", CONSTANT_ANCHOR, (whole, "freshness.beta=10")),
    ):
        both = [score(found("middle", loss, policy, "8", *extra)) for loss in ("reverse_kl", "forward_kl")]
        lines.append((reexecuted, labels, label(policy, "reverse_kl", "8"), *both))
    return table(("reexecuted", "labels", "policy", "reverse KL", "forward KL"), lines)


def coverage(found: Found) -> str:
    """Outages, middle task, reverse KL."""
    outage = ("task.options.drift=0", "task.options.outage=0.5")
    whole, kappa = "freshness.reexecute.share=1", "freshness.refresh.coverage_sup"

    def refreshing(steps: int) -> tuple[str, ...]:
        return (whole, f"{kappa}=0.9", f"freshness.refresh.every_at_least={steps}")

    lines = []
    for name, policy, lag, extra in (
        ("sync", "sync", "0", ()),
        ("async", "async", "8", ()),
        ("defaults: an eighth reexecuted", CONSTANT_ANCHOR, "8", ()),
        ("all reexecuted", CONSTANT_ANCHOR, "8", (whole, f"{kappa}=0")),
        ("... refresh under a coverage of 0.9, once in 100 steps", CONSTANT_ANCHOR, "8", refreshing(100)),
        ("... once in 25", CONSTANT_ANCHOR, "8", refreshing(25)),
    ):
        row = found("middle", "reverse_kl", policy, lag, *outage, *extra)
        lines.append((name, score(row), NONE if row is None else f"{row['throughput']:.2f}"))
    return table(("lag 8", "score", "throughput, of sync"), lines)


def weights(found: Found) -> str:
    """No weights, raw and normalized ones, exact losses at lag 8."""
    raw = "freshness.weights=raw"
    lines = []
    for task in TASKS:
        cells = []
        for loss in EXACT:
            three = (
                found(task, loss, "async", "8"),
                found(task, loss, CONSTANT_ANCHOR, "8", raw),
                found(task, loss, CONSTANT_ANCHOR, "8"),
            )
            cells.append(", ".join(NONE if r is None else f"{r['score']:.3f}" for r in three))
        lines.append((task, *cells))
    return table(("async, raw, normalized", *(LOSSES[loss] for loss in EXACT)), lines)


def mixed(found: Found) -> str:
    """Lags 0 to 8 in one batch, short task."""
    own = [r for r in found.of("short", CACHED) if r["lag"] == MIXED and not r["overrides"]]
    lines = [
        (r["name"], score(r), share(r), f"{r['lag_mean']:.1f}")
        for r in sorted(own, key=lambda r: rank(r["policy"]))
    ]
    return table(("lags 0 to 8 in one batch", "score", "of sync", "mean lag"), lines)


def sgd(found: Iterable[Row]) -> str:
    """Plain SGD without clipping."""
    own = [r for r in found if r["optimizer"] == "sgd"]
    named = [(label(r["policy"], r["loss"], r["lag"]), r["lag"], score(r)) for r in own]
    return table(("plain SGD, no clipping", "lag", "score"), named)


def keys(found: Found) -> str:
    """One key at a time around the top-8 anchor of 10 with raw weights, which is in bold."""

    def top8(*sets: str | None) -> list[str]:
        """None stands for the unchanged policy."""
        scores = []
        for extra in sets:
            row = found("short", CACHED, TOP8, "8", *(extra.split() if extra else ()))
            shown = NONE if row is None else f"{row['score']:.2f}"
            scores.append(shown if extra else f"**{shown}**")
        return scores

    def sweep(key: str, *values: str) -> list[str]:
        return top8(*(None if v == "" else f"freshness.{key}={v}" for v in values))

    paces = [found("short", CACHED, f"fopd, pace {n}", "8") for n in (16, 32, 64, 128)]
    trusts = [
        found("short", CACHED, "trust", "8", *extra)
        for extra in (("freshness.trust=0.1",), (), ("freshness.trust=0.3",), ("freshness.trust=1",))
    ]
    refresh = "freshness.refresh.mean=0.1 freshness.refresh.every_at_least="

    def plain(own: Iterable[Row | None]) -> list[str]:
        return [NONE if r is None else f"{r['score']:.2f}" for r in own]

    constant = found("short", CACHED, CONSTANT_ANCHOR, "8")
    lines: list[tuple[str, str, list[str], str]] = [
        ("`anchor`", "1, 5, 10, 20, 40", sweep("anchor", "1", "5", "", "20", "40"), "auto: 20 up to lag 3"),
        (
            "`pace`, not from that base",
            "16, 32, 64, 128, null (lambda 20)",
            plain([*paces, constant]),
            "auto: 64 beyond lag 3",
        ),
        ("`drift_k`", "1, 2, 8, 32", sweep("drift_k", "1", "2", "", "32"), "32"),
        (
            "`alpha`",
            "0, 0.3, 1, 3, 10",
            sweep("alpha", "0", "0.3", "", "3", "10"),
            "1: no difference beyond noise",
        ),
        (
            "`xi`, of 1/(lag + 1)",
            "0, 0.09, 0.5, 0.8",
            sweep("xi", "0.0000", "", "0.0556", "0.0889"),
            "0.05, a quarter at the default `max_lag`",
        ),
        ("`weights`", "raw, normalized", sweep("weights", "", "normalized"), "normalized: see above"),
        (
            "`step_scale`",
            "none, freshness",
            sweep("step_scale", "", "freshness"),
            "none: it slows runs that have an anchor",
        ),
        (
            "`refresh`",
            "never, once in 100, in 25",
            top8(None, f"{refresh}100", f"{refresh}25"),
            "the paper's 200: no difference, and often is slower",
        ),
        ("`loss.importance`", "false, true", top8(None, "loss.importance=true"), "true beyond lag 3"),
        ("`trust`, as a policy", "0.1, 0.2, 0.3, 1", plain(trusts), "0.2"),
    ]
    return table(
        ("key", "tried", "scores", "default"),
        [(key, tried, ", ".join(scores), why) for key, tried, scores, why in lines],
    )


def tables(results: Sequence[Result]) -> dict[str, str]:
    """All of them, by the name that a page has for them."""
    every = rows(results)
    found = Found(every)
    simple: tuple[Callable[[Found], str], ...] = (
        rule,
        by_lag,
        by_loss,
        paper_point,
        throughput,
        anchors,
        losses,
        horizons,
        strength,
        ideas,
        supervision,
        coverage,
        weights,
        mixed,
        keys,
    )
    made = {f.__name__: f(found) for f in simple}
    return {**made, "headline": headline(found, results), "sgd": sgd(every)}
