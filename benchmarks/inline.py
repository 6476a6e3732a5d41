#!/usr/bin/env python3
"""A whole run in one process: our schedule, engines, losses and freshness, on a virtual clock.

    python benchmarks/inline.py      measures the costs that `Costs` has as defaults

What is sampled, judged and learnt is real; only *when* things end is made up, from a cost model, so that a
run is deterministic and lags mix as they do on a box where roles work side by side. With `schedule.lag` the
clock changes nothing but the modelled throughput. Evaluations take no time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.evaluation import converse
from fopd_cli.freshness.depth import Depth
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.freshness.refresh import Refresh
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.build import learner_config, make_sampler, task_arguments
from fopd_cli.runtime.crew.environment import LocalEnvironments
from fopd_cli.runtime.crew.roles import graded, score
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.scheduling.prompts import PromptStream, context_tokens, evaluation_ids, schedule_config
from fopd_cli.runtime.scheduling.schedule import Schedule
from fopd_cli.runtime.scheduling.tickets import Generate, Load, Measure, Replay, Score, Train
from fopd_cli.samples import Request, Rollout, Sample, SampleId, SampleStats, TargetSpec, TeacherTargets
from fopd_cli.tasks import load_task
from fopd_cli.tasks.replay import cached, realigned
from fopd_cli.tasks.replay import replay as replayed

CPU = torch.device("cpu")
TICK_MS = 10.0  # rollouts of uneven duration end on it, so that those after them are sampled in batches


@dataclass(frozen=True)
class Costs:
    """Virtual milliseconds, of which only ratios matter; measured by this file's `main` (see
    docs/staleness.md).
    """

    sample: float = 1.55  # a response token of one request, in a batch of 32
    score: float = 0.0175  # a token
    train: float = 0.042  # a token
    load: float = 0.23  # an update of weights
    control: float = (
        1.02  # a training step with weights and anchor, as a multiple of one without (benchmarks/learner.py)
    )


@dataclass
class Outcome:
    """What a run gave: records as in metrics.jsonl, and its virtual duration."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    refreshes: int = 0
    seconds: float = 0.0
    # real milliseconds, by kind of work
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    # what was done in them: decoding steps, tokens, updates
    work: Counter[str] = field(default_factory=Counter)


class Inline:
    """One run. Engines are made anew for each, so that nothing passes from one to the next.

    `uneven`: a rollout takes 0.5 to 16 times as long as its tokens say, as slow tools make it. `sgd`: plain
    SGD in the place of AdamW, for the control experiment.
    """

    def __init__(
        self, recipe: Recipe, costs: Costs = Costs(), uneven: bool = False, sgd: bool = False
    ) -> None:
        self.recipe, self.costs, self.uneven = recipe, costs, uneven
        inputs = load_inputs(recipe, place(recipe, 0))
        self.spec: TargetSpec = inputs.target_specs[0]
        self.stream: PromptStream = inputs.stream
        self.task: Any = load_task(*task_arguments(recipe))
        self.tokenizer = inputs.tokenizer
        teacher, longest = (
            recipe.teachers[0],
            max(context_tokens(recipe, self.stream, judged) for judged in (False, True)),
        )
        judge = hf.load_model(teacher.model, "teacher.model", torch.float32)
        self.teacher = TransformersTeacher(
            judge, CPU, 1, teacher.micro_tokens, inputs.vocab, longest, student_k=recipe.loss.student_k
        )
        heads = [self.teacher.head()] if recipe.targets == "hidden" else []
        student = hf.load_model(recipe.student.model, "student.model", torch.float32)
        of_learner = learner_config(recipe, torch.float32, inputs.vocab, longest)
        self.learner = FsdpLearner(student, heads, of_learner, CPU, 0, 1)
        if sgd:
            self.learner.optimizer = torch.optim.SGD(self.learner.student.parameters(), lr=recipe.learner.lr)  # type: ignore[assignment]
        self.sampler = make_sampler(recipe, recipe.student.model, torch.float32, CPU, longest, inputs.vocab)
        r = recipe.freshness.refresh
        policy = POLICIES[recipe.freshness.policy]
        self.depth = Depth(recipe.max_lag, recipe.max_drift)
        self.refresh = Refresh(
            policy.refresh, r.mean, r.coverage_roll, r.coverage_sup, r.every_at_least, r.every
        )
        config = schedule_config(recipe, 1, False, self.stream.replayable)
        self.schedule = Schedule(config, self.stream.train_id, evaluation_ids(recipe, self.stream))
        self.outcome = Outcome()
        self._params = {
            "train": sampling_params(recipe, evaluation=False),
            "eval": sampling_params(recipe, evaluation=True),
        }
        self._weights: dict[int, dict[str, torch.Tensor]] = {}
        self._rollouts: dict[int, Rollout] = {}
        self._targets: dict[int, TeacherTargets] = {}
        self._grades: dict[int, tuple[float, dict[str, float]]] = {}
        self._seen: dict[int, tuple[SampleId, tuple[float, dict[str, float]], Rollout]] = {}
        self._measured: list[tuple[SampleStats, list[int]]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._free_at = [0.0] * recipe.sampler.concurrency  # of each place in the sampler's batch
        self._life = 0  # of what runs in the sampler; a refresh ends it

    def run(self) -> Outcome:
        """Train to the end."""
        self._publish()
        self.schedule.on_learner_ready()
        with (
            LocalEnvironments(self.task, self.stream.frame)
            if self.stream.episodic
            else _Nothing() as self._environments
        ):
            while True:
                while actions := self.schedule.actions():
                    for action in actions:
                        self._start(action)
                if self.schedule.done:
                    break
                self._now, _, happens = heapq.heappop(self._events)
                happens()
                # at once: the schedule need not be asked in between
                while self._events and self._events[0][0] == self._now:
                    heapq.heappop(self._events)[2]()
        self.outcome.seconds, self.outcome.refreshes = self._now, self.schedule.refreshes
        return self.outcome

    def _after(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happens))

    def _start(self, action: Any) -> None:
        s, costs = self.schedule, self.costs
        match action:
            case Load(replica, version):
                with self._timed("load", 1):
                    self.sampler.load(version, self._weights[version].items())
                self._after(costs.load, lambda: s.on_loaded(replica, version))
            case Generate(_, keys):
                self._generate(keys)
            case Score(teacher, keys, again):
                tokens = self._score(keys, again)
                self._after(costs.score * tokens, lambda: self._scored(teacher, keys))
            case Replay(keys, now):
                for key in keys:
                    changed = self._replay(key, now)
                    self._after(costs.sample, lambda k=key, c=changed: s.on_replayed(k, c))  # type: ignore[misc]
            case Train(step, keys):
                samples = [self._sample(k) for k in keys]
                with self._timed("train", sum(len(x.rollout.token_ids) for x in samples)):
                    report = self.learner.train(step, samples)
                self._publish()
                control = 1.0 if self.learner.config.policy.weights == "one" else costs.control
                self._after(costs.train * control * report.tokens, lambda: self._trained(report, keys))
            case Measure(version, keys):
                self._measured.append((self.learner.measure([self._sample(k) for k in keys]), list(keys)))
                self._after(0.0, lambda: self._after_measure(version, keys))
            case _:
                raise RuntimeError(f"unexpected {action}")

    @contextmanager
    def _timed(self, kind: str, work: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.outcome.spent[kind] += 1000 * (time.perf_counter() - began)
        self.outcome.work[kind] += work

    def _publish(self) -> None:
        with torch.no_grad():
            weights = {name: tensor.detach().clone() for name, tensor in self.learner.publish()}
        self._weights[self.learner.version] = weights
        self._weights.pop(self.learner.version - 2, None)

    def _generate(self, keys: tuple[int, ...]) -> None:
        samples = [self.schedule.tickets[k].sample for k in keys]
        requests = [
            Request(k, self.stream.token_ids(i), i.seed(self.recipe.seed), self._params[i.split])
            for k, i in zip(keys, samples, strict=True)
        ]
        if self.stream.episodic:
            prompts = {k: self.stream.prompt(i) for k, i in zip(keys, samples, strict=True)}
            assert self._environments is not None
            version = self.schedule.replicas[0].loaded
            found = list(
                converse(self.sampler, requests, self._environments, prompts, self.tokenizer, version)
            )
        else:
            self.sampler.submit(requests)
            found = []
            while self.sampler.busy:
                with self._timed("sample", 1):
                    found += self.sampler.step()
        ends = []
        for rollout in sorted(found, key=lambda r: r.key):
            if self.schedule.tickets[rollout.key].evaluation:
                ends.append(self._now)
                continue
            place = min(range(len(self._free_at)), key=self._free_at.__getitem__)
            begin = max(self._now, self._free_at[place])
            pace = random.Random(rollout.key).uniform(0.5, 16) if self.uneven else 1.0
            end = begin + self.costs.sample * pace * int(rollout.loss_mask.sum())
            self._free_at[place] = math.ceil(end / TICK_MS) * TICK_MS if self.uneven else end
            ends.append(self._free_at[place])
        if self.schedule.config.deterministic:  # whole groups, whose order of arrival says nothing
            ends = [max(ends)] * len(ends)
        for rollout, end in zip(sorted(found, key=lambda r: r.key), ends, strict=True):
            life = self._life
            self._after(end - self._now, lambda r=rollout, n=life: self._sampled(r, n))  # type: ignore[misc]

    def _sampled(self, rollout: Rollout, life: int) -> None:
        if life == self._life and self.schedule.on_sampled(0, rollout.key, rollout.oldest_version):
            self._rollouts[rollout.key] = rollout
            text = rollout.answer or hf.decode(self.tokenizer, rollout.last_turn)
            prompt = self.stream.prompt(self.schedule.tickets[rollout.key].sample)
            self._grades[rollout.key] = graded(self.task, prompt, text)
            self.schedule.on_graded(rollout.key)

    def _score(self, keys: tuple[int, ...], again: bool) -> int:
        rollouts = [self._rollouts[k] for k in keys]
        for rollout in rollouts:
            if rollout.key not in self._targets:
                fields = self.spec.fields(rollout.response_length)
                self._targets[rollout.key] = TeacherTargets(
                    self.spec.kind,
                    **{n: torch.zeros(s, dtype=d) for n, d, s in fields},  # type: ignore[arg-type]
                )
        tokens = sum(len(r.judged.token_ids) for r in rollouts)
        with self._timed("score", tokens):
            labels = self.recipe.freshness.replay.labels if again else None
            score(self.teacher, rollouts, [self._targets[k] for k in keys], labels)
        return 0 if self.schedule.tickets[keys[0]].evaluation else tokens

    def _scored(self, teacher: int, keys: tuple[int, ...]) -> None:
        for key in self.schedule.on_scored(teacher, keys):
            self._forget(key)

    def _replay(self, key: int, now: int) -> bool:
        """Whether its context has changed; it then has the new one."""
        rollout, prompt = self._rollouts[key], self.stream.prompt(self.schedule.tickets[key].sample)
        texts = [hf.decode_turn(self.tokenizer, rollout.response_ids[a:b]) for a, b in rollout.turns]
        found = asyncio.run(replayed(self.task, prompt, texts, now))
        chat = prompt.messages is not None
        seen = [
            hf.encode_observation(self.tokenizer, o.text, o.role, chat, int(rollout.response_ids[stop - 1]))
            for o, (_, stop) in zip(found.observations, rollout.turns, strict=False)
            if o.text is not None
        ]
        context = realigned(rollout, rollout.token_ids[: rollout.prompt_length], seen)
        changed = not np.array_equal(context.token_ids, cached(rollout, None).token_ids)
        if changed:
            self._rollouts[key] = replace(rollout, context=context)
        return changed

    def _sample(self, key: int) -> Sample:
        return Sample(
            self._rollouts[key], self._targets[key], self.schedule.step - self.schedule.tickets[key].version
        )

    def _trained(self, report: Any, keys: tuple[int, ...]) -> None:
        outcomes = {
            k: records.outcome(w)
            for k, w in zip(report.stats.keys.tolist(), report.stats.weight, strict=True)
        }
        grades = [self._grades[k][0] for k in keys]
        self.outcome.steps.append(
            records.step(report.step + 1, report, [self._rollouts[k] for k in keys], grades)
        )
        self.schedule.ahead = self.depth.update(report.stats.lag, report.drift_above_floor)
        self.schedule.on_trained(report.step, outcomes)
        for key in keys:
            self._forget(key)
        stats, step = report.stats, self.schedule.step
        coverage = float(stats.coverage_roll.mean()), float(stats.coverage_sup.mean())
        if step < self.recipe.learner.steps and self.refresh.reason(
            step, float(stats.freshness.mean()), *coverage
        ):
            self.refresh.last = step
            self._life += 1
            self._free_at = [self._now] * len(self._free_at)
            for key in self.schedule.refresh():
                self._forget(key)

    def _after_measure(self, version: int, keys: tuple[int, ...]) -> None:
        samples = {k: self.schedule.tickets[k].sample for k in keys}
        self._seen |= {k: (samples[k], self._grades[k], self._rollouts[k]) for k in keys}
        complete = self.schedule.on_measured(version, keys)
        for key in keys:
            self._forget(key)
        if complete:
            rows = [(s, g[0], r) for s, g, r in self._seen.values()]
            figures = [g[1] for _, g, _ in self._seen.values()]
            self.outcome.evaluations.append(
                records.evaluation(version, [stats for stats, _ in self._measured], rows, figures)
            )
            self._seen, self._measured = {}, []

    def _forget(self, key: int) -> None:
        for table in (self._rollouts, self._targets, self._grades):
            table.pop(key, None)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        return None


def main() -> None:
    """Print what a unit of each kind of work takes here, one thread, on the short task at lag 0: the median
    of five runs.
    """
    torch.set_num_threads(1)
    overrides = [
        "schedule.lag=0",
        "learner.steps=30",
        "eval.every=0",
        "sampler.concurrency=32",
        "loss.support=sampled",
    ]
    runs = [
        Inline(load_recipe(Path(__file__).parent / "recipes" / "short.yaml", overrides)).run()
        for _ in range(5)
    ]
    for kind in ("sample", "score", "train", "load"):
        each = statistics.median(run.spent[kind] / run.work[kind] for run in runs)
        print(f"{kind}: {each:.4f} ms")


if __name__ == "__main__":
    main()
