"""How long prompts and responses are: a finished run's own, numbers from a file, or a log-normal guess."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from fopd_cli import paths
from fopd_cli.errors import UserError

POINTS = 400  # per distribution
GOLDEN = (math.sqrt(5) - 1) / 2
RARELY = 0.999  # share of guessed lengths below the largest


@dataclass(frozen=True)
class Lengths:
    """Token counts, all equally likely, in ascending order. `source` tells users where they come from."""

    values: tuple[int, ...]
    source: str

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def most(self) -> int:
        return self.values[-1]

    @property
    def context(self) -> float:
        """Mean number of a response's tokens before any given one, averaged over all tokens."""
        return sum(v * v for v in self.values) / (2 * sum(self.values))

    def longest_of(self, count: int) -> int:
        """About the longest of so many."""
        return self.values[int((1 - 1 / count) * len(self.values))]

    def nth(self, number: int) -> int:
        """The length of a sample. Any few in a row cover the whole distribution, so that a short simulation
        has its mean.
        """
        return self.values[int(number * GOLDEN % 1 * len(self.values))]

    def at_most(self, tokens: int) -> Lengths:
        """The same lengths, with longer ones cut off at `tokens`."""
        return Lengths(tuple(min(v, tokens) for v in self.values), self.source)


def log_normal(mean: float, most: int, source: str) -> Lengths:
    """The log-normal distribution with this mean that exceeds `most` once in a thousand, cut off there."""
    mean, z = min(mean, float(most)), NormalDist().inv_cdf(RARELY)
    # ln(most / mean) = z sigma - sigma^2 / 2; this is the smaller solution
    spread = z - math.sqrt(max(0.0, z * z - 2 * math.log(most / mean)))
    points = [(i + 0.5) / POINTS for i in range(POINTS)]
    shape = np.exp(spread * np.array([NormalDist().inv_cdf(p) for p in points]))
    low, high = 0.0, float(most)
    for _ in range(60):  # find the scale that gives the right mean after rounding and cutting off
        scale = (low + high) / 2
        found = np.clip(np.rint(scale * shape), 1, most)
        low, high = (scale, high) if found.mean() < mean else (low, scale)
    return Lengths(tuple(int(v) for v in found), source)


def given(text: str, most: int) -> Lengths:
    """The lengths that `--lengths` gives: `mean,max`, a run directory, or a file with one number per line.
    Lengths over `most`, the recipe's maximum, are cut off. Raises `UserError`.
    """
    path = Path(text)
    if paths.is_dir(path):
        found = of_run(path)
        if found is None:
            raise UserError(f"--lengths: {path} holds no lengths (it has no optimizer step in metrics.jsonl)")
        return found.at_most(most)
    if paths.is_file(path):
        return of_file(path).at_most(most)
    mean, largest = _numbers(text)
    return log_normal(mean, min(largest, most), f"log-normal, as --lengths {text} says").at_most(most)


def _numbers(text: str) -> tuple[float, int]:
    parts = text.split(",")
    try:
        mean, most = float(parts[0]), int(parts[1])
        whole = len(parts) == 2 and 1 <= mean <= most < 10**9
    except (ValueError, IndexError, OverflowError):
        whole = False
    if not whole:
        raise UserError(
            f"--lengths: {text!r} is neither a file or a run directory nor MEAN,MAX in tokens, such as "
            f"800,4096{paths.similar(text)}"
        )
    return mean, most


def of_file(path: Path) -> Lengths:
    """Lengths from a file with one number of tokens per line. Raises `UserError`."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise UserError(f"--lengths: {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.isdigit() or not 0 < int(line) < 10**9:
            raise UserError(f"--lengths: {path}, number {number}: {line[:40]!r} is no number of tokens")
        found.append(int(line))
    if not found:
        raise UserError(f"--lengths: {path} is empty; write one number of tokens a line")
    return spread(found, f"from {path}")


def of_run(path: Path) -> Lengths | None:
    """The lengths of a run's training responses; None if it has done no step."""
    from fopd_cli.report.reading import read

    run = read(path)
    return of_steps(run.steps, f"those of {path}")


def of_steps(steps: Iterable[dict[str, Any]], source: str) -> Lengths | None:
    """The same, from step records: quantiles of each step, or the mean if there are no quantiles."""
    points = (np.arange(40) + 0.5) / 40
    found: list[np.ndarray] = []
    for record in steps:
        mean = float(record["response_length"])
        quantiles = record.get("length_quantiles") or [mean]
        drawn = np.interp(points, np.linspace(0, 1, len(quantiles)), quantiles)
        found.append(drawn * mean / max(1e-9, drawn.mean()))  # a tail is not straight between quantiles
    if not found:
        return None
    return spread([max(1, round(v)) for v in np.concatenate(found).tolist()], source)


def spread(found: Sequence[int], source: str) -> Lengths:
    """At most `POINTS` values, each the mean of an equal part of the sorted ones; keeps the overall mean."""
    values = sorted(found)
    if len(values) > POINTS:
        parts = np.array_split(np.array(values), POINTS)
        values = [round(float(part.mean())) for part in parts]
    return Lengths(tuple(values), source)
