"""`fopd eval`: the score of a model on a task's held-out prompts, by the same code and with the same random numbers
as the run's own evaluation, so that the two agree."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fopd_cli.engines import hf
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.build import make_sampler, resolve_dtype, task_arguments
from fopd_cli.runtime.params import sampling_params
from fopd_cli.runtime.stream import PromptStream, context_tokens, evaluation_ids
from fopd_cli.runtime.telemetry import mean_and_error
from fopd_cli.samples import Request, Rollout
from fopd_cli.tasks import load_task


def evaluate(model: str, recipe: Recipe, out: Path | None) -> dict[str, Any]:
    """Sample, grade, average. `recipe` supplies the task, the sampler's settings, `eval.samples` and the seed."""
    cuda = torch.cuda.is_available()
    task = load_task(*task_arguments(recipe))
    tokenizer = hf.load_tokenizer(model, "MODEL")
    stream = PromptStream(task, tokenizer, recipe.seed, recipe.sampler.samples_per_prompt)
    dtype, device = resolve_dtype(recipe.sampler.dtype, cuda), torch.device("cuda" if cuda else "cpu")
    sampler = make_sampler(recipe, model, dtype, device, context_tokens(recipe, stream))
    ids = evaluation_ids(recipe, stream)
    params = sampling_params(recipe, evaluation=True)
    began, rollouts = time.monotonic(), []
    size = recipe.sampler.concurrency
    for start in range(0, len(ids), size):  # the groups that a run forms
        group = range(start, min(start + size, len(ids)))
        sampler.submit([Request(i, stream.token_ids(ids[i]), ids[i].seed(recipe.seed), params) for i in group])
        while sampler.busy:
            rollouts += sampler.step()
    seconds = time.monotonic() - began
    grades: dict[int, list[float]] = defaultdict(list)
    rows = []
    for rollout in sorted(rollouts, key=lambda r: r.key):
        sample = ids[rollout.key]
        prompt = stream.prompt(sample)
        text = hf.decode(tokenizer, rollout.response_ids)
        grade = float(task.grade(prompt, text))
        grades[sample.prompt].append(grade)
        rows.append(_row(prompt.text or prompt.messages, sample.replica, text, grade, rollout))
    score, error = mean_and_error(grades.values())
    if out is not None:
        _write(out, rows)
    return {
        "model": model, "score": score, "score_error": error, "prompts": len(grades), "samples": recipe.eval.samples,
        "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        "tokens_per_second": sum(r.response_length for r in rollouts) / seconds,
    }  # fmt: skip


def _row(prompt: Any, replica: int, text: str, grade: float, rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt": prompt, "sample": replica, "response": text, "score": None if grade != grade else grade,
        "finish": rollout.finish, "tokens": rollout.response_length,
    }  # fmt: skip


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    try:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from None
