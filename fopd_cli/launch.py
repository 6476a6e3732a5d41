"""From a recipe or a run directory to a running conductor: `fopd run`, `fopd resume`, `fopd fork` and
`--dry-run`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fopd_cli import doctor
from fopd_cli.engines.models.downloads import obtain
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, changes, dump_recipe, recorded_recipe
from fopd_cli.runtime.conductor import Conductor, Model
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, verify, write_synced
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.placing import placed


def run(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Check, then train; returns the summary."""
    inputs = check(recipe, path)
    run_dir = RunDir.create(path, recipe)
    say(f"recipe: {run_dir.recipe}")
    return _conductor(inputs, run_dir).run()


def resume(path: Path, step: int | None, overrides: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint, the newest sound one unless `step` names another; `overrides` stand from then
    on.

    With `step`, changes of the recipe that were made later are undone, like all else that came later. A
    resume that is refused leaves everything as it was.
    """
    return _resuming(RunDir.open(path), step, overrides).run()


def fork(path: Path, new: Path, step: int | None, overrides: list[str]) -> dict[str, Any]:
    """A second run that is the first one up to a checkpoint; `overrides` hold from there on. The first one is
    only read, and may be going on. A fork that is refused leaves nothing behind.
    """
    run_dir = RunDir.open(path)
    step = _sound(CheckpointStore(run_dir.checkpoints), step)
    forked = run_dir.fork(new, step)
    try:
        conductor = _resuming(forked, step, overrides)
    except BaseException:
        shutil.rmtree(new)
        raise
    # Should a worker fail at its start, a plain resume of the fork still knows what was asked for.
    write_synced(forked.recipe, dump_recipe(conductor.recipe))
    return conductor.run()


def fork_name(path: Path, step: int | None) -> Path:
    """Where a fork goes if nobody says."""
    run_dir = RunDir.open(path)
    at = _sound(CheckpointStore(run_dir.checkpoints), step)
    return path.resolve().with_name(f"{path.resolve().name}-fork-{at}")


def _resuming(run_dir: RunDir, step: int | None, overrides: list[str]) -> Conductor:
    """Checked and restored, and nothing written yet."""
    path = run_dir.path
    run_dir.lock()
    store = CheckpointStore(run_dir.checkpoints)
    undone = [] if step is None else _undone(run_dir, step)
    step = _sound(store, step)
    state = store.state(step)
    recipe = run_dir.load_recipe([*undone, *overrides])
    before = recorded_recipe(state["recipe"], store.path(step))
    if keys := changes.refused(before, recipe):
        raise UserError(
            f"{store.path(step)}: was written with another recipe ({', '.join(keys[:5])} differ); resume "
            "it with its own, "
            "or start a new run"
        )
    if recipe.learner.steps < step:
        raise UserError(f"learner.steps: {recipe.learner.steps} is less than the {step} steps that are done")
    in_force = changes.flat(before)
    for at, changed in run_dir.changed():
        if at == step:  # made when it went on from this very checkpoint
            in_force.update({key: values[1] for key, values in changed.items()})
    conductor = _conductor(check(recipe, path), run_dir)
    say(f"resuming {path} from step {step}")
    if undone:
        say(f"the recipe goes back to what it was at step {step}: {', '.join(undone)}")
    if again := changes.invalidated(before, recipe):
        say(f"{', '.join(again)}: samples in flight were made with another value; they are sampled again")
    conductor.restore(step, state, changes.changes(in_force, changes.flat(recipe)), anew=bool(again))
    return conductor


def _sound(store: CheckpointStore, step: int | None) -> int:
    """The step to go on from. Raises `UserError` if there is none, or no sound checkpoint of the one asked
    for.
    """
    if step is None:
        step, problems = store.newest_sound()
        for problem in problems:
            say(f"warning: {problem}; falling back to step {step}")
    elif step not in store.steps():
        raise UserError(f"--step: there is no checkpoint of step {step}; there are {store.steps()}")
    elif damage := verify(store.path(step)):
        raise UserError(f"--step: {damage}; steps with a checkpoint: {store.steps()}")
    return step


def _undone(run_dir: RunDir, step: int) -> list[str]:
    """Overrides that take back what was changed after a step."""
    before: dict[str, Any] = {}
    for at, changed in run_dir.changed():
        if at > step:
            before = {key: values[0] for key, values in changed.items()} | before
    return [changes.as_override(key, value) for key, value in before.items()]


def check(recipe: Recipe, path: Path) -> doctor.Inputs:
    """Preflight: warnings are printed, the first errors stop the run."""
    inputs = doctor.load_inputs(recipe, placed(recipe))
    _heed(doctor.findings(inputs, path))
    fetched = [obtain(model, key, say) for key, model in _models(inputs)]
    if any(fetched):  # now that there are files, they can be looked at
        _heed(doctor.of_models(inputs))
    return inputs


def _models(inputs: doctor.Inputs) -> list[tuple[str, str]]:
    """(key, name) of all that run here."""
    models = [("student.model", inputs.recipe.student.model)]
    return models + [(t.key, t.section.model) for t in inputs.teachers]


def _heed(found: Iterable[doctor.Finding]) -> None:
    errors = []
    for finding in found:
        if finding.level == "error":
            errors.append(f"{finding.what}; {finding.cure}")
        else:
            say(str(finding))
    if errors:
        raise UserError(" | ".join(errors))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _conductor(inputs: doctor.Inputs, run_dir: RunDir) -> Conductor:
    model = Model(inputs.tokenizer, inputs.vocab, inputs.target_specs, inputs.published, inputs.tables)
    return Conductor(inputs.recipe, run_dir, inputs.plan, inputs.stream, model)
