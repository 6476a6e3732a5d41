"""How a student does on its teacher's own answers: KL(teacher || student), which a student that has fallen
silent or repeats itself cannot make small. (On its own answers, the KL can be small for that very reason.)
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from inline import Inline

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.samples import Request, Rollout, SamplingParams

PROMPTS = 32  # held-out ones, an answer to each


def kl_on_answers(race: Inline) -> float:
    """The mean over the tokens of the teacher's answers to held-out prompts, in nats, of the student as it is
    now.
    """
    recipe, learner = race.recipe, race.engines.learner.engine
    stream = race.inputs.stream
    prompts = tuple(tuple(stream.encoded("eval", i).tolist()) for i in stream.kept["eval"][:PROMPTS])
    longest, path = recipe.sampler.max_new_tokens, recipe.teachers[0].model
    student = hf.load_model(recipe.student.model, "student", torch.float32)
    student.load_state_dict({n: t.detach().float().cpu() for n, t in learner.publish()}, strict=False)
    teacher = hf.load_model(path, "teacher", torch.float32)
    total, tokens = 0.0, 0
    for answer in _answers(path, prompts, longest):
        own, theirs = _logprobs(student, answer), _logprobs(teacher, answer)
        total += float((theirs.exp() * (theirs - own)).sum())
        tokens += len(theirs)
    return total / tokens


@cache
def _answers(model: str, prompts: tuple[tuple[int, ...], ...], longest: int) -> list[Rollout]:
    """The teacher's answers, sampled once, always from the same seeds."""
    sampler = on_weights(model, torch.float32, torch.device("cpu"), len(prompts))
    params = SamplingParams(max_new_tokens=longest)
    sampler.submit([Request(i, np.array(p, dtype=np.int32), i, params) for i, p in enumerate(prompts)])
    found: list[Rollout] = []
    while sampler.busy:
        found += sampler.step()
    return sorted(found, key=lambda r: r.key)


@torch.no_grad()
def _logprobs(model: Any, answer: Rollout) -> torch.Tensor:
    """`(tokens of the answer, vocabulary)`."""
    logits = model(torch.from_numpy(answer.token_ids).long()[None]).logits[0, answer.prompt_length - 1 : -1]
    return torch.log_softmax(logits.float(), -1)
