"""The best student so far, by an evaluation's score or KL. Its weights are kept as they were evaluated, and a
run that has not improved for `patience` evaluations in a row ends.

A checkpoint records the evaluations up to its step, and so what was best then. A run that goes back to it
continues from that best, so weights are kept as long as they are the best of any existing checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from fopd_cli.runtime.memory.weights import WeightChannel

Evaluations = Mapping[str, Mapping[str, Any]]  # by version
Metric = Literal["score", "kl"]


class Best:
    """`folder` holds one file of weights per version."""

    def __init__(self, metric: Metric, patience: int, folder: Path) -> None:
        self.metric, self.patience, self.folder = metric, patience, folder

    def of(self, evaluations: Evaluations) -> int | None:
        """The version whose metric is best, the earliest of equals; None while there is none."""
        better = -1 if self.metric == "score" else 1
        found = [
            (better * value, int(v))
            for v, e in evaluations.items()
            if math.isfinite(value := _figure(e, self.metric))
        ]
        return min(found)[1] if found else None

    def kept(self) -> list[int]:
        """Versions whose weights are here."""
        names = (p.stem.removeprefix("step-") for p in self.folder.glob("step-*.safetensors"))
        return sorted(int(name) for name in names if name.isdigit())

    def of_kept(self, evaluations: Evaluations) -> int | None:
        here = set(self.kept())
        return self.of({v: e for v, e in evaluations.items() if int(v) in here})

    def keep(self, version: int, channel: WeightChannel) -> None:
        """Save its weights as they were published, which is as they were evaluated. Raises `OSError`."""
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / "writing.tmp"
        try:
            save_file(dict(channel.read(version)), str(temporary))
            channel.check(version)
            temporary.replace(self.file(version))
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def file(self, version: int) -> Path:
        return self.folder / f"step-{version:06d}.safetensors"

    def tidy(self, known: Iterable[Evaluations]) -> None:
        """Remove weights that are not the best of any of the `known` evaluations: the run's current ones and
        those of each checkpoint.
        """
        needed = {self.of_kept(evaluations) for evaluations in known}
        for version in self.kept():
            if version not in needed:
                self.file(version).unlink()

    def out_of_patience(self, evaluations: Evaluations) -> str | None:
        """Why the run should end; None: it should go on."""
        best = self.of(evaluations)
        if self.patience == 0 or best is None:
            return None
        since = sum(int(v) > best for v in evaluations)
        if since < self.patience:
            return None
        name = "the score" if self.metric == "score" else "the KL to the teacher"
        value = _figure(evaluations[str(best)], self.metric)
        return (
            f"{name} has not become better than {value:.4g} (step {best}) in {since} evaluations "
            "(eval.patience); the run ends early"
        )


def _figure(evaluation: Mapping[str, Any], metric: Metric) -> float:
    value = evaluation.get(metric)
    return math.nan if value is None else float(value)
