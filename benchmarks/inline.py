#!/usr/bin/env python3
"""A whole run in one process on a virtual clock: the conductor, schedule, engines, losses and freshness of
`fopd run`, with a crew that consists of function calls (`runtime/crew/inprocess.py`).

    python benchmarks/inline.py      measures the costs that `Costs` has as defaults

Sampling, judging and learning are real; only the times are made up, by the cost model below, so that a run is
deterministic and lags mix as they do on a box where roles work side by side. With `schedule.lag` the clock
changes nothing but the modelled throughput. Evaluations take no time.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, assert_never

import torch
import torch.distributed as dist

from fopd_cli.freshness.policies import POLICIES
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.crew.inprocess import InProcess, LocalEngines
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.saving import Unsaved
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.placement import Plan, place
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State

CPU = torch.device("cpu")
TICK_MS = 10.0  # uneven rollouts end at multiples of it, so that those after them are sampled in batches


@dataclass(frozen=True)
class Costs:
    """Virtual milliseconds, of which only ratios matter; measured by this file's `main` (see
    docs/staleness-details.md).
    """

    sample: float = 1.55  # per response token of one request, in a batch of 32
    score: float = 0.0175  # per token
    train: float = 0.042  # per token
    load: float = 0.23  # per update of weights
    control: float = (
        1.02  # a training step with weights and anchor, as a multiple of one without (benchmarks/learner.py)
    )


class CostModel:
    """When everything ends. `uneven`: a rollout takes 0.5 to 16 times as long as its tokens imply, as slow
    tools make it. `held_out` tells which samples belong to an evaluation.
    """

    def __init__(self, costs: Costs, recipe: Recipe, uneven: bool, held_out: Callable[[int], bool]) -> None:
        self.costs, self.uneven, self.held_out = costs, uneven, held_out
        # Where two runs must agree, only whole groups arrive, so that their order does not matter.
        self._together = recipe.schedule.lag is not None or recipe.max_lag == 0
        self._control = 1.0 if POLICIES[recipe.freshness.policy].weights == "one" else costs.control
        self._free_at = [0.0] * recipe.sampler.concurrency  # of each place in the sampler's batch

    def stopped(self, now: float, engine: Engine) -> None:
        self._free_at = [now] * len(self._free_at)

    def ends(
        self, now: float, engine: Engine, command: m.Command, answers: Sequence[m.Answer]
    ) -> Sequence[float]:
        if isinstance(command, m.GenerateCommand):
            ends = [self._sampled(now, answer) for answer in answers]
            return [max(ends)] * len(ends) if self._together else ends
        return [now + self._takes(command) for _ in answers]

    def _sampled(self, now: float, answer: m.Answer) -> float:
        assert isinstance(answer, m.Sampled)
        (rollout,) = answer.rollouts
        if self.held_out(rollout.key):
            return now
        place = min(range(len(self._free_at)), key=self._free_at.__getitem__)
        begin = max(now, self._free_at[place])
        pace = random.Random(rollout.key).uniform(0.5, 16) if self.uneven else 1.0
        end = begin + self.costs.sample * pace * int(rollout.loss_mask.sum())
        self._free_at[place] = math.ceil(end / TICK_MS) * TICK_MS if self.uneven else end
        return self._free_at[place]

    def _takes(self, command: m.Command) -> float:
        match command:
            case m.LoadCommand():
                return self.costs.load
            case m.ScoreCommand(rollouts):
                free = self.held_out(rollouts[0].key)
                return 0.0 if free else self.costs.score * sum(len(r.judged.token_ids) for r in rollouts)
            case m.TrainCommand(_, rollouts):
                return self.costs.train * self._control * sum(len(r.token_ids) for r in rollouts)
            case m.ReexecuteCommand():
                return self.costs.sample
            case m.EvaluateCommand() | m.SaveCommand() | m.GradeCommand() | m.TurnCommand():
                return 0.0
            case m.GenerateCommand() | m.AbortCommand() | m.CancelCommand():
                raise AssertionError(f"{command} has no answer of its own")
            case _:
                assert_never(command)


class Timed:
    """Engines, and the real time they take by kind of work: decoding steps, tokens, updates."""

    def __init__(self, engines: LocalEngines) -> None:
        self.engines = engines
        self.spent: defaultdict[str, float] = defaultdict(float)  # milliseconds
        self.work: Counter[str] = Counter()

    def close(self) -> None:
        self.engines.close()

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        began = time.perf_counter()
        answers = self.engines.do(engine, command)
        kind, work = _work(command, answers)
        self.spent[kind] += 1000 * (time.perf_counter() - began)
        self.work[kind] += work
        return answers


def _work(command: m.Command, answers: Sequence[m.Answer]) -> tuple[str, int]:
    match command:
        case m.GenerateCommand():  # all of them run at once
            sampled = [r for a in answers if isinstance(a, m.Sampled) for r in a.rollouts]
            return "sample", max(r.response_length for r in sampled)
        case m.ScoreCommand(rollouts):
            return "score", sum(len(r.judged.token_ids) for r in rollouts)
        case m.TrainCommand(_, rollouts):
            return "train", sum(len(r.token_ids) for r in rollouts)
        case m.LoadCommand():
            return "load", 1
        case _:
            return "other", 1


@dataclass
class Outcome:
    """The result of a run: records as in metrics.jsonl, and its virtual duration."""

    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    refreshes: int
    seconds: float
    spent: dict[str, float] = field(default_factory=dict)  # real milliseconds, by kind of work
    work: Counter[str] = field(default_factory=Counter)


class Inline:
    """One run. Engines are made new for each, so that nothing passes from one to the next.

    `sgd`: plain SGD instead of AdamW, for the control experiment. `cuda`: all engines on the first GPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        costs: Costs = Costs(),
        uneven: bool = False,
        sgd: bool = False,
        cuda: bool = False,
    ) -> None:
        self.recipe = recipe
        plan = place(recipe, 0)
        self.inputs = load_inputs(recipe, _on_one_gpu(plan) if cuda else plan)
        self.state = State(self.inputs)
        arena = self.state.buffer.arena.memory
        self.setup = self.inputs.setup(arena, Path(tempfile.gettempdir()))
        self.engines = LocalEngines(self.inputs.plan, self.setup)
        if sgd:
            learner: Any = self.engines.learner.engine
            learner.optimizer = torch.optim.SGD(learner.student.parameters(), lr=recipe.learner.lr)
        self.timed = self._watched(self.engines)
        schedule = self.state.schedule
        model = CostModel(costs, recipe, uneven, lambda key: schedule.tickets[key].evaluation)
        self.crew = InProcess(self.timed, model)
        self.records = Recorded()
        self.journal = Journal(recipe, self.inputs.tokenizer, lambda *_: self.records, quiet=True)

    def _watched(self, engines: LocalEngines) -> Timed:
        return Timed(engines)

    def run(self) -> Outcome:
        """Train to the end."""
        signals = Signals(self.journal.say)  # never entered: the process keeps its own handlers
        with self.journal:
            Conductor(self.state, self.crew, self.journal, Unsaved(), signals).run()
        metrics, refreshes = self.records.metrics, self.state.schedule.refreshes
        steps, evaluations = metrics.kind("step"), metrics.kind("eval")
        return Outcome(steps, evaluations, refreshes, self.crew.now, self.timed.spent, self.timed.work)

    def close(self) -> None:
        """Leave the learner's process group, so that another run in this process can make its own."""
        if dist.is_initialized() and self.recipe.sampler.engine != "vllm":  # which shares it, and ends it
            dist.destroy_process_group()


def _on_one_gpu(plan: Plan) -> Plan:
    """The same engines on one device, none of which ever sleeps."""

    def there(spec: WorkerSpec) -> WorkerSpec:
        return replace(spec, devices=(0,))

    return replace(
        plan,
        mode="colocate",
        samplers=tuple(map(there, plan.samplers)),
        teachers=tuple(tuple(map(there, ranks)) for ranks in plan.teachers),
        learners=tuple(map(there, plan.learners)),
    )


def main() -> None:
    """Print what a unit of each kind of work costs here, on one thread, for the short task at lag 0: the
    median of five runs.
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
