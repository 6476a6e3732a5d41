"""`fopd runs` and `fopd diff`: runs as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fopd_cli import paths
from fopd_cli.errors import UserError
from fopd_cli.report import texts
from fopd_cli.report.reading import Run, is_run, read, sets_of

FIGURES = (("score", 3), ("kl", 4))


def of_runs(folder: Path) -> str:
    """A row for each run in a directory or one level deeper; `folder` may be a run. Raises `UserError`."""
    if not paths.is_dir(folder):
        raise UserError(f"{folder}: is not a directory; runs are in runs/ unless --run-dir says otherwise")
    inside = (p.parent for p in (*folder.glob("*/recipe.yaml"), *folder.glob("*/*/recipe.yaml")))
    found = [folder] if is_run(folder) else sorted(filter(paths.has_run, inside))
    if not found:
        raise UserError(
            f"{folder}: holds no run (a directory with a recipe.yaml); start one with: fopd run RECIPE"
        )
    rows = [["name", "state", "step", "score", "KL", "hours", "process"]]
    for path in found:
        run = read(path)
        score, kl = (_measured(run, key, digits) for key, digits in FIGURES)
        process = "" if run.pid is None else str(run.pid)
        name = "." if path == folder else str(path.relative_to(folder))
        steps = f"{run.step}/{run.planned}"
        rows.append([name, run.state, steps, score, kl, f"{run.seconds / 3600:.2f}", process])
        for held_out in run.sets:
            figures = [_measured(run.of_set(held_out), key, digits) for key, digits in FIGURES]
            rows.append([f"  on {held_out}", "", "", *figures, "", ""])
    return aligned(rows)


def of_differences(first: Path, second: Path) -> str:
    """Keys that differ, then results. Errors of differences treat the two runs' prompts as independent."""
    runs = [read(first), read(second)]
    names = [run.name if first.resolve().name != second.resolve().name else str(run.path) for run in runs]
    keys = [[key, *values] for key, values in texts.differences(runs)]
    results = [["result", *names, "difference"]]
    results.append(["state", *(run.state for run in runs), ""])
    results.append(["steps", *(f"{run.step}/{run.planned}" for run in runs), ""])
    for key, digits in FIGURES:
        label = "KL to the teacher" if key == "kl" else key
        results.append(
            [label, *(_measured(run, key, digits) for run in runs), _difference(runs, key, digits)]
        )
    for held_out in sets_of(runs):
        on = [run.of_set(held_out) for run in runs]
        for key, digits in FIGURES:
            figures = [_measured(run, key, digits) for run in on]
            if set(figures) != {"-"}:
                label = "KL" if key == "kl" else key
                results.append([f"{label} on {held_out}", *figures, _difference(on, key, digits)])
    results.append(["hours", *(f"{run.seconds / 3600:.2f}" for run in runs), ""])
    recipes = aligned([["recipe", *names], *keys]) if keys else "recipe: the same in every key"
    return f"{recipes}\n\n{aligned(results)}"


def _measured(run: Run, key: str, digits: int) -> str:
    value, error = run.last(key)
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _difference(runs: Sequence[Run], key: str, digits: int) -> str:
    (a, a_error), (b, b_error) = (run.last(key) for run in runs)
    if a is None or b is None:
        return "-"
    error = "" if a_error is None or b_error is None else f" ± {math.hypot(a_error, b_error):.{digits}f}"
    return f"{b - a:+.{digits}f}{error}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )
