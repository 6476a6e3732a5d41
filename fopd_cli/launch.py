"""From a recipe or a run directory to a running conductor: `fopd run`, `fopd resume` and `--dry-run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fopd_cli import doctor
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.checkpoint import verify
from fopd_cli.runtime.conductor import Conductor, Model
from fopd_cli.runtime.placement import cuda_devices, place
from fopd_cli.runtime.rundir import RunDir


def run(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Check, then train; returns the summary."""
    inputs = check(recipe, path)
    run_dir = RunDir.create(path, recipe)
    say(f"recipe: {run_dir.recipe}")
    return _conductor(inputs, run_dir).run()


def resume(path: Path, step: int | None, overrides: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint, the newest sound one unless `step` names another."""
    run_dir = RunDir.open(path)
    run_dir.lock()
    recipe = run_dir.load_recipe(overrides)
    conductor = _conductor(check(recipe, path), run_dir)
    store = conductor.store
    if step is None:
        step, problems = store.newest_sound()
        for problem in problems:
            say(f"warning: {problem}; falling back to step {step}")
    elif step not in store.steps():
        raise UserError(f"--step: there is no checkpoint of step {step}; there are {store.steps()}")
    elif damage := verify(store.path(step)):
        raise UserError(f"--step: {damage}; steps with a checkpoint: {store.steps()}")
    say(f"resuming {path} from step {step}")
    conductor.restore(step)
    return conductor.run()


def check(recipe: Recipe, path: Path) -> doctor.Inputs:
    """Preflight: warnings are printed, the first errors stop the run."""
    inputs = doctor.load_inputs(recipe, place(recipe, cuda_devices()))
    found = list(doctor.findings(inputs, path))
    for finding in found:
        if finding.level != "error":
            say(str(finding))
    errors = [f"{f.what}; {f.cure}" for f in found if f.level == "error"]
    if errors:
        raise UserError(" | ".join(errors))
    return inputs


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _conductor(inputs: doctor.Inputs, run_dir: RunDir) -> Conductor:
    model = Model(inputs.tokenizer, inputs.vocab, inputs.target_specs, inputs.published, inputs.tables)
    return Conductor(inputs.recipe, run_dir, inputs.plan, inputs.stream, model)
