"""From names to a checked recipe on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fopd_cli import doctor
from fopd_cli.errors import UserError
from fopd_cli.files import write_synced
from fopd_cli.inputs import load_inputs
from fopd_cli.new import data, models, recipe
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.placement import cuda_devices
from fopd_cli.runtime.placing import placed


def write(
    folder: Path,
    student: str,
    teacher: str,
    source: str,
    question: str | None,
    answer: str | None,
    say: Callable[[str], None],
) -> tuple[Path, list[doctor.Finding]]:
    """Inspect, say what was assumed, write `folder/recipe.yaml`; returns its path and what doctor finds.

    Raises `UserError` for what cannot be read, and if there is a recipe already.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        raise UserError(f"{path}: is there already; give another directory (fopd new DIR) or move it away")
    learner, judge = models.look(student, "--student"), models.look(teacher, "--teacher")
    rows = data.look(source, question, answer)
    notes = models.check_pair(learner, judge)
    devices = cuda_devices()
    text, assumed = recipe.text(folder, learner, judge, rows, devices)
    say(f"student {learner}; teacher {judge}; {rows.rows} rows; {devices} CUDA devices")
    for line in [*notes, *assumed]:
        say(f"assumed: {line}")
    folder.mkdir(parents=True, exist_ok=True)
    write_synced(path, text)
    parsed = load_recipe(path)
    inputs = load_inputs(parsed, placed(parsed))
    return path, list(doctor.findings(inputs, Path("runs")))
