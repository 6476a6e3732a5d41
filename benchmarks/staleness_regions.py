"""The map of benchmarks/staleness.py: learning rate by lag, and in each cell the least control that holds.

Scores are shares of prompts answered rightly, so a cell of one seed is known to a tenth or so. A control that
ends below `HOLDS` by less than two standard errors is not called lost: the cell has it with a question mark,
and is hatched. Of the published method and of the strong anchors the best of four counts, of async its only
one: where there is one seed, that is too kind to the first two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from staleness_names import CONSTANT, LOSSES, SAMPLED

HOLDS = 0.95  # of the synchronous run's score at the same learning rate
PROMPTS = 128  # held-out, of each seed
PAPER = 0.64  # what async keeps of sync in the paper's tables, at lag 8
NEAR = 0.15
OWN_RATE = {"short": 1e-3, "long": 3e-4}  # of each task's recipe, which its overrides do not name
# Ours: at lags over 3 the defaults are the first, up to there the last but one (and for exact losses).
STRONG = ("fopd, pace 64", "fopd, pace 160", "fopd, defaults", "trust")
NEEDED = ("nothing", "the published method", "a strong anchor", "nothing holds")
UNCLEAR = "?"
ANCHORS = dict(zip(STRONG, ("pace 64", "pace 160", "lambda 20"), strict=False))
COLOURS = ("#c7e9c0", "#fdd49e", "#fc8d59", "#bdbdbd")
HATCH = "///"  # of a cell that its seeds do not decide


@dataclass
class Place:
    """One learning rate and lag: scores as shares of sync, by policy; of the published method, by lambda."""

    rate: float
    lag: int
    sync: float
    seeds: int = 1  # the fewest of any of its runs, the synchronous one included
    anchored: bool = True  # by default: losses from sampled tokens are, exact ones are not
    shares: dict[str, float] = field(default_factory=dict)
    published: dict[float, float] = field(default_factory=dict)

    @property
    def ours(self) -> tuple[float, str] | None:
        """With today's defaults or, where they were not run, the nearest anchor that was; and its name."""
        tried = STRONG[:3] if self.lag > CONSTANT else STRONG[2:3]
        return next(((self.shares[p], self._anchor(p)) for p in tried if p in self.shares), None)

    def _anchor(self, policy: str) -> str:
        return ANCHORS[policy] if self.anchored else "none"

    @property
    def best(self) -> tuple[float, float] | None:
        """Of the published method, over its lambdas: share and lambda, of equal ones the highest."""
        return max(((share, strength) for strength, share in self.published.items()), default=None)

    def error(self, share: float) -> float:
        """Standard error of a share, as far as it comes from counting `PROMPTS` answers of each seed."""
        counted = PROMPTS * self.seeds
        run, sync = min(share * self.sync, 1.0), self.sync
        of_run, of_sync = run * (1 - run) / counted, sync * (1 - sync) / counted
        return math.sqrt(of_run + share**2 * of_sync) / sync if sync else 0.0

    @property
    def needed(self) -> str | None:
        """The first of `NEEDED` that is not shown to lose, with `UNCLEAR` if it is not shown to hold either.

        None while runs are missing.
        """
        if "async" not in self.shares:
            return None
        published = max(self.published.values(), default=0.0)
        strong = max((self.shares[p] for p in STRONG if p in self.shares), default=0.0)
        for name, share in zip(NEEDED, (self.shares["async"], published, strong), strict=False):
            if share >= HOLDS:
                return name
            if share + 2 * self.error(share) >= HOLDS:
                return name + UNCLEAR
        return NEEDED[-1]


def places(rows: Sequence[dict[str, Any]], task: str, loss: str) -> list[Place]:
    """The map of one task and loss from `staleness_report.rows`."""
    found: dict[tuple[float, int], Place] = {}
    own = [r for r in rows if (r["task"], r["loss"], r["optimizer"]) == (task, loss, "adamw")]
    keyed = [(dict(pair.split("=", 1) for pair in r["overrides"].split()), r) for r in own]
    sync = {_rate(keys, task): r for keys, r in keyed if r["policy"] == "sync" and r["lag"] == "0"}
    for keys, r in keyed:
        rate, strength = _rate(keys, task), keys.get("freshness.anchor")
        if set(keys) - {"learner.lr", "freshness.anchor"} or (strength and r["policy"] != "fopd"):
            continue  # a variant of another study
        if not r["lag"].isdigit() or r["lag"] == "0" or rate not in sync:
            continue
        base, lag = sync[rate], int(r["lag"])
        new = Place(rate, lag, base["score"], base["seeds"], loss in SAMPLED)
        place = found.setdefault((rate, lag), new)
        place.seeds = min(place.seeds, r["seeds"])
        share = r["score"] / base["score"] if base["score"] else 0.0
        if r["policy"] == "fopd":
            place.published[float(strength or 1)] = share
        elif r["policy"] in ("async", *STRONG):
            place.shares[r["policy"]] = share
    return [found[key] for key in sorted(found)]


def _rate(keys: dict[str, str], task: str) -> float:
    return float(keys.get("learner.lr", OWN_RATE[task]))


def paper(found: Sequence[Place]) -> Place | None:
    """The place where async keeps about what it keeps in the paper, if there is one."""
    known = [p for p in found if "async" in p.shares and abs(p.shares["async"] - PAPER) < NEAR]
    return min(known, key=lambda p: abs(p.shares["async"] - PAPER), default=None)


def markdown(found: Sequence[Place]) -> str:
    """A line per place."""
    shares = ("async", "published, best lambda", "ours (its anchor)", "trust")
    heads = ("learning rate", "lag", "seeds", "sync", *shares, "needed")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for p in found:
        published = "-" if p.best is None else f"{p.best[0]:.0%} ({p.best[1]:g})"
        first, trust = (_share(p.shares.get(name)) for name in ("async", "trust"))
        ours = "-" if p.ours is None else f"{p.ours[0]:.0%} ({p.ours[1]})"
        place = (f"{p.rate:.0e}", str(p.lag), str(p.seeds), f"{p.sync:.2f}")
        lines.append(f"| {' | '.join((*place, first, published, ours, trust, p.needed or '-'))} |")
    return re.sub(r"e-0", "e-", "\n".join(lines))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def draw(path: Path, maps: dict[tuple[str, str], list[Place]], metadata: dict[str, str]) -> None:
    """One panel per map, by (task, loss): the colour says what is needed, the figures are async, the
    published method with its best lambda, and ours. `metadata` goes into the file.
    """
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    columns = min(2, len(maps))
    lines = -(-len(maps) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(5.5 * columns, 4.2 * lines), squeeze=False)
    for panel in panels.flat[len(maps) :]:
        panel.axis("off")
    for ((task, loss), found), panel in zip(maps.items(), panels.flat, strict=False):
        draw_map(panel, found)
        panel.set_title(f"{task} task, {LOSSES[loss]}", fontsize=10)
    legend = [Patch(color=colour, label=name) for colour, name in zip(COLOURS, NEEDED, strict=True)]
    legend.append(Patch(facecolor="white", edgecolor="grey", hatch=HATCH, label="not decided by its seeds"))
    figure.legend(handles=legend, loc="lower center", ncol=len(legend), fontsize=8, frameon=False)
    figure.suptitle(
        "The least that keeps 95% of sync. Figures: shares of sync's score by async, by f-OPD as published "
        "with\nthe best of its lambdas (0.3, 1, 3, 10), by ours. Most cells are one seed, known to a tenth. "
        "Framed:\nwhere async keeps what it keeps in the paper",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.99))
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)


def draw_map(panel: Any, found: Sequence[Place]) -> None:
    """The map of one task and loss into a panel of matplotlib."""
    from matplotlib.patches import Rectangle

    rates, lags = sorted({p.rate for p in found}), sorted({p.lag for p in found})
    marked = paper(found)
    for p in found:
        x, y = lags.index(p.lag), rates.index(p.rate)
        needed = p.needed or ""
        colour = COLOURS[NEEDED.index(needed.rstrip(UNCLEAR))] if needed else "white"
        corner = (x - 0.47, y - 0.47)
        hatch = HATCH if needed.endswith(UNCLEAR) else None
        panel.add_patch(
            Rectangle(corner, 0.94, 0.94, facecolor=colour, edgecolor="white", linewidth=0, hatch=hatch)
        )
        if p is marked:
            panel.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="black", linewidth=2))
        shares = [f"async {_share(p.shares['async'])}"] if "async" in p.shares else ["async not run"]
        if p.best is not None:
            shares.append(f"λ {p.best[1]:g}: {_share(p.best[0])}")
        shares.append(f"ours {_share(p.ours and p.ours[0])}")
        panel.text(x, y, "\n".join(shares), ha="center", va="center", fontsize=8)
    panel.set(xlabel="lag", ylabel="learning rate", xlim=(-0.5, len(lags) - 0.5))
    panel.set(ylim=(-0.5, len(rates) - 0.5), xticks=range(len(lags)), yticks=range(len(rates)))
    panel.set_xticklabels(list(map(str, lags)))
    panel.set_yticklabels([f"{rate:g}" for rate in rates])
