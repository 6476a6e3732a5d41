"""The trained student as a Hugging Face model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fopd_cli.engines.learner import dcp, lora
from fopd_cli.engines.models import hf, model_files
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.report.reading import jsonl
from fopd_cli.runtime.build import load_student, published_adapter
from fopd_cli.runtime.journal.best import Best
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, verify
from fopd_cli.runtime.journal.rundir import RunDir

PREFIX = "lm."  # the learner keeps the model under this name


def export_student(
    run: RunDir, out: Path, step: int | None, adapter: bool = False, dtype: torch.dtype | None = None
) -> int:
    """Write the student of a checkpoint (default: the newest sound one) to `out`; returns its step.

    Weights are saved in `dtype`, by default the one in which the run sampled and evaluated them, so that its
    scores hold for this model. `adapter`: only what a LoRA student learned, in peft's format.
    """
    recipe = run.load_recipe([])
    if adapter and recipe.student.lora is None:
        raise UserError(f"--adapter: {run.path} trained all weights, not adapters (student.lora)")
    store = CheckpointStore(run.checkpoints)
    if step is None:
        step, _ = store.newest_sound()
    elif problem := verify(store.path(step)):
        raise UserError(f"--step: {problem}; steps with a checkpoint: {store.steps()}")
    evaluated_in = getattr(torch, store.state(step)["student_dtype"])
    model = _trained(recipe, store.path(step) / "learner", evaluated_in)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if adapter and recipe.student.lora is not None:
            lora.check_adapter_alone(model, "--adapter")
            lora.write_adapter(out, lora.adapters(model), recipe.student.lora.alpha, recipe.student.model)
        else:
            whole = _merged(recipe, model)
            hf.cast(whole, dtype or evaluated_in)
            model_files.write_model(whole, recipe.student.model, out)
        model_files.write_tokenizer(recipe.student.model, out)
        (out / "fopd.json").write_text(json.dumps({"run": str(run.path), "step": step}) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the student to {out}: {error}") from None
    return step


def export_best(run: RunDir, out: Path, dtype: torch.dtype | None = None) -> int | None:
    """The same for the student of the best evaluation, if `eval.keep_best` kept one; returns its step, else
    None.
    """
    keep = run.load_recipe([]).eval.keep_best
    if keep is None:
        return None
    records = (r for r in jsonl(run.path / "metrics.jsonl") if r.get("kind") == "eval")
    best = Best(keep, 0, run.best)
    step = best.of_kept({str(r["step"]): r for r in records})
    if step is not None:
        store = CheckpointStore(run.checkpoints)
        evaluated_in = getattr(torch, store.state(store.newest_sound()[0])["student_dtype"])
        _export_kept(run, out, step, best.file(step), dtype or evaluated_in)
    return step


def _export_kept(run: RunDir, out: Path, step: int, weights: Path, dtype: torch.dtype) -> None:
    """Export weights that were kept as they were published (`runtime/journal/best.py`)."""
    recipe, tensors = run.load_recipe([]), load_file(weights)
    if published_adapter(recipe) is None:
        model: Any = hf.load_model(recipe.student.model, "student.model", dtype)
        model.load_state_dict(tensors, strict=False)  # tied weights are stored once
    else:
        model = load_student(recipe, dtype)
        for name, tensor in lora.adapters(model):
            tensor.copy_(tensors[name])
        model = _merged(recipe, model)
        hf.cast(model, dtype)
    try:
        out.mkdir(parents=True, exist_ok=True)
        model_files.write_model(model, recipe.student.model, out)
        model_files.write_tokenizer(recipe.student.model, out)
        (out / "fopd.json").write_text(json.dumps({"run": str(run.path), "step": step}) + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the student to {out}: {error}") from None


def student_of(run: RunDir, step: int | None) -> Path:
    """A directory with the run's student: `student/` if the run has ended, else a checkpoint's, exported once
    to `exports/`.
    """
    if step is None and (run.student / "config.json").is_file():
        return run.student
    store = CheckpointStore(run.checkpoints)
    if step is None:
        step, _ = store.newest_sound()
    elif step not in store.steps():
        raise UserError(f"--step: there is no checkpoint of step {step}; there are {store.steps()}")
    out = run.path / "exports" / f"step-{step:06d}"
    if not (out / "fopd.json").is_file():  # written last
        export_student(run, out, step)
    return out


def _trained(recipe: Recipe, folder: Path, frozen_dtype: torch.dtype) -> Any:
    """The student as it was trained, with the weights of a learner's checkpoint."""
    model = load_student(recipe, frozen_dtype)
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    learnt = {PREFIX + name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    if recipe.student.lora is not None:
        learnt = {name: tensor for name, tensor in learnt.items() if lora.is_adapter(name)}
    dcp.load({"model": learnt}, folder, alone=True)  # in place
    return model


def _merged(recipe: Recipe, model: Any) -> Any:
    """A plain model, with adapters merged into their base."""
    if recipe.student.lora is None:
        return model
    plain = hf.load_model(recipe.student.model, "student.model", torch.float32)
    plain.load_state_dict(dict(lora.merged(model)), strict=False)  # tied weights are stored once
    return plain
