"""`fopd eval`: the score of a model on a task's held-out prompts, by the same code and with the same random numbers
as the run's own evaluation, so that the two agree."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from fopd_cli.engines import hf
from fopd_cli.engines.protocols import Sampler
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe
from fopd_cli.runtime import messages as m
from fopd_cli.runtime.build import make_sampler, resolve_dtype, task_arguments
from fopd_cli.runtime.environment import LocalEnvironments
from fopd_cli.runtime.episodes import Episodes
from fopd_cli.runtime.params import sampling_params
from fopd_cli.runtime.stream import PromptStream, context_tokens, evaluation_ids
from fopd_cli.runtime.telemetry import mean_and_error
from fopd_cli.samples import Prompt, Request, Rollout
from fopd_cli.tasks import load_task


def evaluate(model: str, recipe: Recipe, out: Path | None) -> dict[str, Any]:
    """Sample, grade, average. `recipe` supplies the task, the sampler's settings, `eval.samples` and the seed."""
    cuda = torch.cuda.is_available()
    task: Any = load_task(*task_arguments(recipe))  # with episodes or without
    tokenizer = hf.load_tokenizer(model, "MODEL")
    stream = PromptStream(task, tokenizer, recipe.seed, recipe.sampler.samples_per_prompt)
    dtype, device = resolve_dtype(recipe.sampler.dtype, cuda), torch.device("cuda" if cuda else "cpu")
    sampler = make_sampler(recipe, model, dtype, device, context_tokens(recipe, stream))
    ids = evaluation_ids(recipe, stream)
    params = sampling_params(recipe, evaluation=True)
    began, rollouts = time.monotonic(), []
    size = recipe.sampler.concurrency
    prompts = {i: stream.prompt(sample) for i, sample in enumerate(ids)}
    with contextlib.ExitStack() as stack:
        environments = stack.enter_context(LocalEnvironments(task, tokenizer)) if stream.episodic else None
        for start in range(0, len(ids), size):  # the groups that a run forms
            group = range(start, min(start + size, len(ids)))
            requests = [Request(i, stream.token_ids(ids[i]), ids[i].seed(recipe.seed), params) for i in group]
            if environments is None:
                rollouts += _sample(sampler, requests)
            else:
                rollouts += _converse(sampler, requests, environments, prompts, tokenizer)
    seconds = time.monotonic() - began
    grades: dict[int, list[float]] = defaultdict(list)
    rows = []
    for rollout in sorted(rollouts, key=lambda r: r.key):
        sample = ids[rollout.key]
        prompt = stream.prompt(sample)
        text = hf.decode(tokenizer, rollout.response_ids)
        grade = float(task.grade(prompt, hf.decode(tokenizer, rollout.last_turn)))
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


def _sample(sampler: Sampler, requests: list[Request]) -> list[Rollout]:
    sampler.submit(requests)
    rollouts = []
    while sampler.busy:
        rollouts += sampler.step()
    return rollouts


def _converse(
    sampler: Sampler,
    requests: list[Request],
    environments: LocalEnvironments,
    prompts: dict[int, Prompt],
    tokenizer: Any,
) -> list[Rollout]:
    """Whole episodes: turns are sampled while tools of other episodes run."""
    episodes, rollouts = Episodes(), []
    for request in requests:
        episodes.start(request, replica=0)
    sampler.submit(requests)
    while episodes.running:
        for turn in sampler.step() if sampler.busy else []:
            episode = episodes.on_turn(turn)
            assert episode is not None
            if turn.finish == "length":
                environments.cancel([turn.key])
                rollouts.append(episodes.finish(episode))
            else:
                environments.turn(
                    m.TurnCommand(turn.key, episode.life, prompts[turn.key], hf.decode(tokenizer, turn.response_ids))
                )
        for seen in environments.receive(block=bool(episodes.running) and not sampler.busy):
            episode = episodes.on_observed(seen.key, seen.life, seen.token_ids, seen.calls)
            assert episode is not None
            following = None if seen.token_ids is None else episodes.next_turn(episode)
            if following is not None:
                episode.sampling = True
                sampler.submit([following])
            else:
                environments.cancel([seen.key])
                rollouts.append(episodes.finish(episode))
    return rollouts


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
