"""What the policies and losses of benchmarks/staleness.py are called in tables and figures.

Rows keep the names that they were recorded with. One of these misleads today: "fopd, defaults" has the anchor
that was the default before 2026-11-26. Here "defaults" is what a user gets today.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

CONSTANT = 3  # the longest lag at which the defaults' anchor is constant
MIXED = "0..8"
UP_TO = "<="  # before the bound of a lag that the clock decides
CACHED = "pg_cached"
SAMPLED = (CACHED, "pg_ratio", "pg_recomputed")
PUBLISHED = "fopd"
CONSTANT_ANCHOR, WEAKENING = "fopd, defaults", "fopd, pace 64"
NOT_BUILT = "@"  # begins an override of an idea that was tried and not built
POLICIES = {
    "sync": "sync",
    "async": "async",
    "fixed_refresh": "refresh every 10 steps",
    "lag_weight": "lag weights",
    "reweight": "freshness weights",
    "reweight+anchor": "freshness weights and anchor, lambda 1",
    "reweight, scaled step": "freshness weights, step scaled by them",
    "recomputed, ratio": "AsyncOPD's: recomputed, ratio",
    "trust": "trust, 0.2 nats",
    "fopd, quadratic anchor": "quadratic anchor, lambda 10",
    "fopd, top-k anchor": "top-8 anchor, lambda 10",
}
ORDER = (
    "sync",
    "async",
    "fixed_refresh",
    "lag_weight",
    "reweight",
    "reweight+anchor",
    PUBLISHED,
    "recomputed, ratio",
    "ratio capped at 2",
    "reweight, scaled step",
    "trust",
    "fopd, quadratic anchor",
    "fopd, top-k anchor",
    CONSTANT_ANCHOR,
    WEAKENING,
)
LOSSES = {
    "pg_cached": "policy gradient, cached",
    "pg_ratio": "policy gradient, ratio",
    "pg_recomputed": "policy gradient, recomputed",
    "reverse_kl": "reverse KL, full",
    "forward_kl": "forward KL, full",
    "jsd": "JSD(0.5), full",
    "topk": "top-8 and tail",
}
ON_TEXT = {**LOSSES, "topk64": "top-64 and tail"}  # losses of the real pair


def rank(policy: str) -> tuple[int, str]:
    """Sorts policies: published ones first, then ours, then by name, in which numbers count as numbers."""
    place = ORDER.index(policy) if policy in ORDER else len(ORDER)
    return place, re.sub(r"\d+", lambda number: number[0].zfill(4), policy)


def longest(lag: str) -> int:
    """The longest lag that "8", "0..8" or "<=8" allows."""
    return int(lag.removeprefix(UP_TO).rpartition("..")[2])


def label(policy: str, loss: str, lag: str, extra: Sequence[str] = ()) -> str:
    """A policy's name for readers. `extra` are its overrides, of which only a published lambda is in the
    name.
    """
    if policy == PUBLISHED:
        return f"f-OPD as published, lambda {_lambda(extra) or '1'}"
    if policy == CONSTANT_ANCHOR:
        if loss not in SAMPLED:
            return "defaults"
        return "lambda 20" if longest(lag) > CONSTANT else "lambda 20 (defaults)"
    if policy == WEAKENING:
        return "pace 64 (defaults)" if longest(lag) > CONSTANT else "pace 64"
    return POLICIES.get(policy, policy.removeprefix("fopd, "))


def full_label(policy: str, loss: str, lag: str, extra: Sequence[str] = (), optimizer: str = "adamw") -> str:
    """`label`, with all that differs from the policy as it is elsewhere."""
    others = [pair for pair in extra if policy != PUBLISHED or not pair.startswith("freshness.anchor=")]
    name = label(policy, loss, lag, extra)
    if others:
        name += f", with {' '.join(others)}"
    if any(pair.startswith(NOT_BUILT) for pair in others):
        name += " (not built)"
    return name if optimizer == "adamw" else f"{name}, {optimizer}"


def _lambda(extra: Sequence[str]) -> str | None:
    keys = dict(pair.split("=", 1) for pair in extra)
    return keys.get("freshness.anchor")
