"""Drives the real conductor and schedule with simulated engines, on a virtual clock, until the run reaches
its steady state.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.registry import engine_of
from fopd_cli.engines.text.templates import Frame
from fopd_cli.inputs import Inputs
from fopd_cli.plan.contention import Contention, places
from fopd_cli.plan.cost import Costs
from fopd_cli.plan.crew import Enough, Shared
from fopd_cli.plan.lags import with_lag
from fopd_cli.plan.lengths import Lengths
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew.pretend import Pretend
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.saving import Unsaved
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.memory.model import Models
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.prompts import PromptStream
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.samples import Prompt, Request, TargetSpec

MEASURED = 12  # optimizer steps
MOST_SAMPLES = 240  # in flight at once; beyond that, each simulated sample stands for several
MOST_LAG = 32  # a larger lag only changes how long the pipeline takes to fill
MOST_BEGUN = 24  # steps simulated before timing begins
PROMPTS = 512
ROOMY_GB = 1e6
GRID = 24  # points in a mean response at which responses may end


@dataclass(frozen=True)
class Outcome:
    """A run in its steady state, by simulation. Seconds and tokens are per optimizer step."""

    seconds: float
    begin: float  # seconds of the first `begun` steps, while the pipeline fills
    begun: int
    tokens: float  # in responses
    lag_mean: float
    lag_max: int
    busy: dict[str, float]  # share of time that each role works, averaged over its engines

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bottleneck(self) -> str:
        """The role that is idle the least."""
        return max(self.busy, key=lambda role: self.busy[role])

    def total(self, steps: int) -> float:
        """Seconds for this many steps."""
        return self.begin * min(1.0, steps / self.begun) + self.seconds * max(0, steps - self.begun)


def simulate(
    recipe: Recipe,
    plan: Plan,
    models: Models,
    costs: Costs,
    responses: Lengths,
    prompts: Lengths,
    cores: int,
    here: bool = True,
    measured: int = MEASURED,
) -> Outcome:
    """Times at least `measured` steps once the pipeline is full. `here`: teacher targets get what this
    machine's main memory allows; elsewhere, whatever they need.
    """
    before, (recipe, many) = recipe, _simulated(recipe, here)
    inputs = _inputs(recipe, plan, models, prompts)
    state, records = State(inputs), Recorded()
    remote = [i for i, t in enumerate(recipe.teachers) if engine_of(t).remote]
    begun = max(1, min(recipe.max_lag + 3, MOST_BEGUN, recipe.learner.steps - 1))
    # Work comes in rounds of up to lag + 1 steps, above all where roles take turns, so we time whole rounds.
    rounds = max(2 if plan.exclusive else 1, math.ceil(measured / (recipe.max_lag + 1)))
    timed = rounds * (recipe.max_lag + 1)
    crew = Shared(
        Pretend(_sampled(responses)),
        costs,
        Contention(places(plan, remote), cores, costs.spread),
        delays=[t.delay_ms / 1000 for t in recipe.teachers],
        recompute=recipe.schedule.inflight == "keep",
        many=many,
        waves=max(1.0, many / before.sampler.concurrency),
        grid=max(1, round(responses.mean / GRID)),
        steps=begun + timed,
    )
    with (
        Journal(recipe, inputs.tokenizer, lambda *_: records, quiet=True) as journal,
        contextlib.suppress(Enough),
    ):
        Conductor(state, crew, journal, Unsaved(), Signals(journal.say)).run()
    return _outcome(crew, records, begun, before.learner.batch_samples)


def _simulated(recipe: Recipe, here: bool) -> tuple[Recipe, int]:
    """The recipe to simulate, and how many samples each simulated one stands for."""
    recipe = with_lag(recipe, min(recipe.max_lag, MOST_LAG))
    flying = recipe.learner.batch_samples * (recipe.max_lag + 1)
    many = max(1, min(math.ceil(flying / MOST_SAMPLES), recipe.learner.batch_samples // 8))
    teachers = []
    for t in recipe.teachers:
        room = t.buffer_gb / many if t.buffer_gb is not None else None if here and many == 1 else ROOMY_GB
        update = {"context": None, "template": "student", "buffer_gb": room}
        teachers.append(t.model_copy(update={**update, "batch_samples": -(-t.batch_samples // many)}))
    sampler, learner = recipe.sampler, recipe.learner
    found = {
        "teachers": tuple(teachers),
        "sampler": sampler.model_copy(update={"concurrency": -(-sampler.concurrency // many)}),
        "learner": learner.model_copy(update={"batch_samples": max(1, learner.batch_samples // many)}),
    }
    return recipe.model_copy(update=found), many


def _outcome(crew: Shared, records: Recorded, begun: int, samples: int) -> Outcome:
    marks, steps = crew.marks, records.metrics.kind("step")
    begun = min(begun, max(1, len(marks) - 1))
    (start, before), (end, after) = marks[begun - 1], marks[-1]
    if len(marks) == 1:
        start, before = 0.0, {}
    timed = steps[begun:] or steps
    count = max(1, len(marks) - begun)
    roles: dict[str, list[float]] = defaultdict(list)
    for engine in crew.contention.places:
        share = (after.get(engine, 0.0) - before.get(engine, 0.0)) / max(end - start, 1e-12)
        roles[engine.role].append(min(1.0, share))
    return Outcome(
        seconds=(end - start) / count,
        begin=start if len(marks) > 1 else end,
        begun=begun,
        tokens=samples * sum(r["response_length"] for r in timed) / len(timed),
        lag_mean=sum(r["lag_mean"] for r in timed) / len(timed),
        lag_max=max(r["lag_max"] for r in timed),
        busy={role: sum(shares) / len(shares) for role, shares in roles.items()},
    )


# ---- what the conductor asks of a run's inputs -------------------------------------------------------------


def _sampled(responses: Lengths) -> Any:
    """The length of each response."""

    def length(request: Request) -> int:
        return min(responses.nth(request.key), request.params.max_new_tokens)

    return length


class _Task:
    """Prompts of the given lengths, none held out: evaluations are counted separately."""

    def __init__(self, lengths: Lengths, teachers: Sequence[str]) -> None:
        names = [teachers[i % len(teachers)] for i in range(PROMPTS)]
        self._prompts = [Prompt(i, text=str(lengths.nth(i)), teacher=name) for i, name in enumerate(names)]

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self._prompts if split == "train" else []

    def grade(self, prompt: Prompt, response: str) -> float:
        return 0.0


class _Tokenizer:
    """Each text is just its number of tokens; all tokens are 0 and decode to nothing."""

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": np.zeros(int(text), np.int32)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


class _Inputs(Inputs):
    """Inputs without models having been read."""

    specs: tuple[TargetSpec, ...] = ()

    @property
    def target_specs(self) -> tuple[TargetSpec, ...]:
        return self.specs


def _inputs(recipe: Recipe, plan: Plan, models: Models, prompts: Lengths) -> Inputs:
    tokenizer = _Tokenizer()
    task = _Task(prompts, [t.name for t in recipe.teachers])
    per_prompt = recipe.sampler.samples_per_prompt
    stream = PromptStream(task, Frame(tokenizer), recipe.seed, per_prompt, recipe.teachers)
    found = _Inputs(recipe, plan, None, tokenizer, [], stream, [])
    kind = recipe.targets
    for section, ranks in zip(recipe.teachers, plan.teachers, strict=True):
        width = section.k if kind == "topk" else 1
        if kind == "hidden":
            width = models.teachers[section.name].width
        wide = section.dtype == "fp32" or (section.dtype == "auto" and not ranks[0].devices)
        found.specs += (TargetSpec(kind, width, torch.float32 if wide else torch.bfloat16),)
    return found
