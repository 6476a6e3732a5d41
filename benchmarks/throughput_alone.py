"""Each stage of a run by itself: the run's own worker processes, of which only one has anything to do.

    crew.start ──> sampler: all prompts at once ──> teacher: the rollouts ──> learner: batches of them

A stage never waits here: all of its commands are in its inbox before the clock starts. No run with this
stage can be faster than that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from fopd_cli.inputs import load_inputs, with_engines
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.crew import crew as engines
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.processes import Processes
from fopd_cli.runtime.placing import placed
from fopd_cli.runtime.scheduling.conversations import Conversations
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State
from fopd_cli.samples import Request, Rollout

RECORDED = 8  # batches that the teacher scores and the learner trains on, over and over
LAG = 1  # of their samples: a learner estimates the drift of samples that have one


@dataclass(frozen=True)
class Stages:
    """Seconds that each stage takes for one optimizer step's samples, and their mean response tokens."""

    sampler: float
    teacher: float
    learner: float
    response_tokens: float


def alone(recipe: Recipe, steps: int, folder: Path) -> Stages:
    """Measure the stages one after the other, each over `steps` batches; `folder` is for the workers' logs.

    The recipe's buffer must have room for `RECORDED` batches (`schedule.max_lag`).
    """
    (folder / "logs").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        crew = _Crew(recipe, folder, stack)
        sampler, rollouts = crew.sample(steps)
        batch = recipe.learner.batch_samples
        recorded = [rollouts[i * batch : (i + 1) * batch] for i in range(RECORDED)]
        teacher = crew.score(recorded, steps)
        learner = crew.train(recorded, steps)
        lengths = [r.response_length for r in rollouts]
        return Stages(sampler, teacher, learner, sum(lengths) / len(lengths))


class _Crew:
    def __init__(self, recipe: Recipe, folder: Path, stack: contextlib.ExitStack) -> None:
        self.recipe = recipe = with_engines(recipe)
        self.inputs = load_inputs(recipe, placed(recipe))
        self.stream, self.buffer = self.inputs.stream, State(self.inputs).buffer
        setup = self.inputs.setup(self.buffer.arena.memory, folder)
        plan, episodic, signals = self.inputs.plan, self.stream.reexecutable, Signals(_silent)
        processes = Processes(plan, setup, folder / "logs", episodic, signals, _silent)
        self.crew = stack.enter_context(processes)
        self.crew.start()
        self._events = self._listen()

    def _listen(self) -> Iterator[m.Event]:
        while True:
            for engine, event in self.crew.receive():
                if isinstance(event, m.EngineLost):
                    raise RuntimeError(f"{engine.role}: {event.reason}")
                yield event

    # ---- sampler -------------------------------------------------------------------------------------------

    def sample(self, steps: int) -> tuple[float, list[Rollout]]:
        """(seconds per batch, the rollouts of the first batches). The first batch fills the pipeline, and
        the last drains it; neither is timed.
        """
        batch = self.recipe.learner.batch_samples
        steps = max(steps, RECORDED)
        sampler, total = engines.sampler(0), (steps + 2) * batch
        self.crew.send(sampler, m.LoadCommand(0))
        next(e for e in self._events if isinstance(e, m.Loaded))
        requests = map(self._request, range(total))
        conversations = self._conversations() if self.stream.episodic else None

        def start(count: int) -> None:
            new = list(islice(requests, count))
            if conversations is not None:
                conversations.start(0, new)
            elif new:
                self.crew.send(sampler, m.GenerateCommand(new))

        # An episode keeps its place among the running ones while its tools run; the rest queue in the engine.
        start(total if conversations is None else self.recipe.sampler.concurrency)
        found: dict[int, Rollout] = {}
        times: list[float] = []
        for event in self._events:
            finished: Sequence[Rollout] = ()
            if isinstance(event, m.Sampled):
                finished = event.rollouts
                if conversations is not None:
                    finished = [r for _, r in conversations.on_turns(0, event.rollouts)]
            elif isinstance(event, m.Observed) and conversations is not None:
                finished = [r for _, r in conversations.on_observed(event)]
            times += [time.perf_counter()] * len(finished)
            found.update((r.key, r) for r in finished)
            if conversations is not None and finished:
                start(len(finished))
            if len(found) == total:
                break
        seconds = times[(steps + 1) * batch - 1] - times[batch - 1]
        return seconds / steps, [found[key] for key in range(RECORDED * batch)]

    def _request(self, key: int) -> Request:
        sample = self.stream.train_id(key)
        params = sampling_params(self.recipe, evaluation=False)
        return Request(key, self.stream.token_ids(sample), sample.seed(self.recipe.seed), params)

    def _conversations(self) -> Conversations:
        return Conversations(
            self.inputs.tokenizer,
            lambda key: (self.stream.prompt(self.stream.train_id(key)), 0),
            lambda replica, requests: self.crew.send(engines.sampler(replica), m.GenerateCommand(requests)),
            lambda command: self.crew.send(engines.ENVIRONMENT, command),
            together=False,
        )

    # ---- teacher and learner -------------------------------------------------------------------------------

    def score(self, batches: Sequence[Sequence[Rollout]], steps: int) -> float:
        """Seconds per batch, in calls of `teacher.batch_samples`."""
        size = self.recipe.teachers[0].batch_samples
        calls = []
        for batch in batches:
            for i in range(0, len(batch), size):
                entries = [self.buffer.add(rollout, 0) for rollout in batch[i : i + size]]
                if not self.buffer.reserve(e.key for e in entries):
                    raise RuntimeError("the arena is too small for the recorded batches")
                told = [e.judged(self.stream.told(self.stream.train_id(e.key))) for e in entries]
                calls.append(m.ScoreCommand(told, [e.targets for e in entries]))
        per_batch = len(calls) / len(batches)
        again = islice(cycle(calls), max(len(calls), round(steps * per_batch)) + 1)
        return self._timed(engines.teacher(0), list(again), m.Scored) * per_batch

    def train(self, batches: Sequence[Sequence[Rollout]], steps: int) -> float:
        """Seconds per optimizer step, publication included."""
        regions = [[self.buffer[r.key].targets for r in batch] for batch in batches]
        commands = [
            m.TrainCommand(step, list(batches[i]), regions[i], [LAG] * len(batches[i]))
            for step, i in enumerate(islice(cycle(range(len(batches))), steps + 2))
        ]
        return self._timed(engines.LEARNER, commands, m.Trained, unmeasured=2)

    def _timed(
        self, engine: engines.Engine, commands: Sequence[Any], answer: type, unmeasured: int = 1
    ) -> float:
        """Seconds per command, without the first ones, which do one-time work."""
        for command in commands:
            self.crew.send(engine, command)
        times = []
        for event in self._events:
            if isinstance(event, answer):
                times.append(time.perf_counter())
                if len(times) == len(commands):
                    break
        return (times[-1] - times[unmeasured - 1]) / (len(times) - unmeasured)


def _silent(line: str) -> None:
    """What is said to people in a run is of no interest here."""
