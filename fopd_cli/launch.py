"""From a recipe or a run directory to a running conductor: `fopd run`, `fopd resume`, `fopd fork` and
`--dry-run`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fopd_cli import doctor
from fopd_cli.engines.models.downloads import obtain
from fopd_cli.errors import UserError, disk_error
from fopd_cli.files import write_synced
from fopd_cli.inputs import Inputs, load_inputs, with_engines
from fopd_cli.paths import has_run
from fopd_cli.plan import hardware
from fopd_cli.plan.command import before_a_run
from fopd_cli.recipe import Recipe, changes, dump_recipe, recorded_recipe
from fopd_cli.runtime.build import sampler_dtype
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew import cores
from fopd_cli.runtime.crew.processes import Processes
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, verify
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.live import view
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.saving import Saver
from fopd_cli.runtime.journal.sinks import Changes, Progress, Resume, Telemetry
from fopd_cli.runtime.journal.trackers import Subject, open_trackers
from fopd_cli.runtime.placement import to_plain
from fopd_cli.runtime.placing import models, placed
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.runtime.time_model import at_peak


def run(recipe: Recipe, path: Path, live: bool = False) -> dict[str, Any]:
    """Check, then train; returns the summary. `live`: with a view of it in the terminal."""
    recipe = with_engines(recipe)
    inputs = check(recipe, path)
    run_dir = RunDir.create(path, recipe)
    say(f"recipe: {run_dir.recipe}")
    say(before_a_run(inputs))
    return _Run(inputs, run_dir, live).train()


def resume(path: Path, step: int | None, overrides: list[str], live: bool = False) -> dict[str, Any]:
    """Continue from a checkpoint, the newest sound one unless `step` names another; `overrides` apply from
    then on.

    With `step`, later changes of the recipe are undone, like everything else that came later. A resume that
    is refused leaves everything unchanged.
    """
    return _resuming(RunDir.open(path), step, overrides, live).train()


def fork(path: Path, new: Path, step: int | None, overrides: list[str]) -> dict[str, Any]:
    """A second run that equals the first up to a checkpoint; `overrides` apply from there on. The first run
    is only read, and may be running. A fork that is refused leaves nothing behind.
    """
    run_dir = RunDir.open(path)
    step = _sound(CheckpointStore(run_dir.checkpoints), step)
    forked = run_dir.fork(new, step)
    try:
        run = _resuming(forked, step, overrides)
    except BaseException:
        shutil.rmtree(new)
        raise
    # If a worker fails at its start, a plain resume of the fork still has the overrides.
    write_synced(forked.recipe, dump_recipe(run.recipe))
    return run.train()


def fork_name(path: Path, step: int | None) -> Path:
    """Where a fork goes by default."""
    run_dir = RunDir.open(path)
    at = _sound(CheckpointStore(run_dir.checkpoints), step)
    return path.resolve().with_name(f"{path.resolve().name}-fork-{at}")


def _resuming(run_dir: RunDir, step: int | None, overrides: list[str], live: bool = False) -> _Run:
    """A run that is checked and restored, with nothing written yet."""
    path, store = run_dir.path, CheckpointStore(run_dir.checkpoints)
    if not has_run(path):  # refused before it is locked: a lock says that something has run
        store.newest_sound()
    run_dir.lock()
    undone = [] if step is None else _undone(run_dir, step)
    step = _sound(store, step)
    state = store.state(step)
    recipe = with_engines(run_dir.load_recipe([*undone, *overrides]))
    before = recorded_recipe(state["recipe"], store.path(step))
    if keys := changes.refused(before, recipe):
        raise UserError(
            f"{store.path(step)}: was written with another recipe ({', '.join(keys[:5])} differ); resume it "
            "with its own, or start a new run"
        )
    if recipe.learner.steps < step:
        raise UserError(f"learner.steps: {recipe.learner.steps} is less than the {step} steps that are done")
    in_force = changes.flat(before)
    for at, changed in run_dir.changed():
        if at == step:  # made when it resumed from this very checkpoint
            in_force.update({key: values[1] for key, values in changed.items()})
    run = _Run(check(recipe, path), run_dir, live)
    say(f"resuming {path} from step {step}")
    if undone:
        say(f"the recipe goes back to what it was at step {step}: {', '.join(undone)}")
    if again := changes.invalidated(before, recipe):
        say(f"{', '.join(again)}: samples in flight were made with another value; they are sampled again")
    since = changes.changes(in_force, changes.flat(recipe))
    run.setup.restore = run.saver.restore(step, state, since, anew=bool(again))
    return run


def _sound(store: CheckpointStore, step: int | None) -> int:
    """The step to continue from. Raises `UserError` if there is none, or `step` has no sound checkpoint."""
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
    """Overrides that undo recipe changes made after a step."""
    before: dict[str, Any] = {}
    for at, changed in run_dir.changed():
        if at > step:
            before = {key: values[0] for key, values in changed.items()} | before
    return [changes.as_override(key, value) for key, value in before.items()]


def check(recipe: Recipe, path: Path) -> Inputs:
    """Preflight: warnings are printed, errors stop the run."""
    inputs = load_inputs(recipe, placed(recipe))
    _heed(doctor.findings(inputs, path))
    models = [("student.model", recipe.student.model), *((t.key, t.section.model) for t in inputs.teachers)]
    if any([obtain(model, key, say) for key, model in models]):
        _heed(doctor.of_models(inputs))  # the files are here now, so they can be checked
    return inputs


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


class _Run:
    """A conductor, its processes, and everything around them."""

    def __init__(self, inputs: Inputs, run_dir: RunDir, live: bool) -> None:
        self.recipe, self.run_dir = inputs.recipe, run_dir
        self.state = State(inputs)
        self.setup = inputs.setup(self.state.buffer.arena.memory, run_dir.path)
        display = view if live else Progress
        flops = hardware.peak()
        rates = {} if flops is None else at_peak(inputs.recipe, inputs.plan, models(inputs.recipe), flops)
        self.journal = Journal(inputs.recipe, inputs.tokenizer, self._open_sinks, False, display, rates)
        self.signals = Signals(self.journal.say)
        dtype = sampler_dtype(inputs.recipe, inputs.plan)
        self.saver = Saver(self.state, run_dir, self.journal, self.setup.weights.host, dtype)
        reexecutable, say = inputs.stream.reexecutable, self.journal.say
        crew = Processes(inputs.plan, self.setup, run_dir.logs, reexecutable, self.signals, say)
        self.conductor = Conductor(self.state, crew, self.journal, self.saver, self.signals)

    def train(self) -> dict[str, Any]:
        """Train to the end, then export the student; returns the summary. Ctrl-C, SIGTERM or a closed
        terminal: checkpoint and stop; again: stop now.
        """
        try:
            with self.signals, self.journal:
                self.conductor.run()
                student = {**self._export(), "stopped_early": self.conductor.stopped_early}
                summary = self.journal.summary(self.state.schedule, student)
                write_synced(self.run_dir.summary, json.dumps(summary, indent=1) + "\n")
                return summary
        except OSError as error:
            if (full := disk_error(error)) is None:
                raise
            how = self.saver.how_to_continue
            raise UserError(f"{self.run_dir.path}: {full}; free some disk space, then {how}") from None

    def _open_sinks(self, resume: Resume | None, changed: Changes) -> Telemetry:
        if resume is not None:
            self.run_dir.take_up(self.recipe, resume, changed)
        where = {"cores": cores.here(), "plan": to_plain(self.state.inputs.plan)}
        write_synced(self.run_dir.placement, json.dumps(where) + "\n")
        track = self.recipe.track
        subject = Subject(self.run_dir.path, self.recipe.model_dump(mode="json"))
        trackers = open_trackers(track, subject, self.journal.say)
        return Telemetry(self.run_dir.path, resume, self.journal.say, "tensorboard" in track, trackers)

    def _export(self) -> dict[str, Any]:
        """Export the last student, or the best, in Hugging Face's format; returns which."""
        from fopd_cli.export import export_best, export_student

        out = self.run_dir.student
        if out.exists():  # from an earlier end
            shutil.rmtree(out)
        step = export_best(self.run_dir, out)
        if step is not None:
            return {"student_step": step, "student_chosen_by": self.recipe.eval.keep_best}
        return {"student_step": export_student(self.run_dir, out, None), "student_chosen_by": "last"}
