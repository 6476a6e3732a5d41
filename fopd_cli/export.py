"""The trained student as a Hugging Face model directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fopd_cli.engines import dcp, hf
from fopd_cli.errors import UserError
from fopd_cli.runtime.checkpoint import CheckpointStore, verify
from fopd_cli.runtime.rundir import RunDir

PREFIX = "lm."  # the learner keeps the model under this name


def export_student(run: RunDir, out: Path, step: int | None) -> int:
    """Write the student of a checkpoint (default: the newest sound one) to `out`; returns its step.

    Weights are saved in the dtype in which the run sampled and evaluated them, so that its scores are those of this model.
    """
    recipe = run.load_recipe([])
    store = CheckpointStore(run.checkpoints, recipe.checkpoint.keep)
    if step is None:
        step, _ = store.newest_sound()
    elif problem := verify(store.path(step)):
        raise UserError(f"--step: {problem}; steps with a checkpoint: {store.steps()}")
    model = hf.load_model(recipe.student.model, "student.model", torch.float32)
    state = {"model": {PREFIX + name: tensor for name, tensor in model.state_dict().items()}}
    dcp.load(state, store.path(step) / "learner", alone=True)
    model.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state["model"].items()})
    evaluated_in = json.loads((store.path(step) / "state.json").read_text())["student_dtype"]
    model.to(getattr(torch, evaluated_in))
    try:
        model.save_pretrained(out)  # type: ignore[operator]
        hf.load_tokenizer(recipe.student.model, "student.model").save_pretrained(out)
        (out / "fopd.json").write_text(json.dumps({"run": str(run.path), "step": step}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the student to {out}: {error}") from None
    return step
