"""What each engine does with its commands, and the worker processes that run it.

A role takes one command at a time and returns the answer; its `*_main` is a worker process that passes it
commands from the mailbox. A crew within one process (`inprocess.py`) calls the same roles directly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch.distributed as dist

from fopd_cli.engines.protocols import Learner, Sampler, Teacher
from fopd_cli.engines.registry import engine_of
from fopd_cli.engines.tokens.batching import balanced_shares
from fopd_cli.freshness import supervision
from fopd_cli.recipe import Labels
from fopd_cli.runtime.build import Setup, build_learner, build_sampler, build_teacher, task_arguments
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.environment import Environments
from fopd_cli.runtime.crew.fleet import Mailbox, WorkerSpec
from fopd_cli.runtime.crew.publisher import Publisher
from fopd_cli.runtime.crew.writer import Writer
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.samples import Prompt, Rollout, Sample, TeacherTargets
from fopd_cli.tasks import load_task
from fopd_cli.tasks.base import Grade

SPAN_S = 0.25  # a sampler that is never idle reports its work in spans of about this length


def _serve(mailbox: Mailbox, do: Callable[[Any], m.Message | None]) -> None:
    """Carry out every command and send what it returns, until it is time to stop."""
    mailbox.send(m.Ready())
    while not isinstance(command := mailbox.receive(block=True), m.StopCommand):
        if (answer := do(command)) is not None:
            mailbox.send(answer)


def _rest(engine: Sampler | Teacher | Learner, command: m.RestCommand) -> m.Asleep | m.Awake:
    match command:
        case m.SleepCommand():
            engine.sleep()
            return m.Asleep()
        case m.WakeCommand():
            engine.wake()
            return m.Awake()
        case _:
            assert_never(command)


# ---- sampler


@dataclass
class _Work:
    """What a sampler did in a span: decoding passes, the requests that ran in each, summed up, how often
    others joined them, how often it took requests or handed over finished ones, and tokens of the prompts
    that it took on; `tokens` are those of the responses that ended in it.
    """

    tokens: int = 0
    passes: int = 0
    rows: int = 0
    joins: int = 0
    exchanges: int = 0
    prompt_tokens: int = 0


class Sampling:
    """Takes commands between tokens; finished rollouts leave at once."""

    def __init__(self, spec: WorkerSpec, setup: Setup) -> None:
        self.engine = build_sampler(spec, setup)
        section = setup.recipe.sampler
        self.weights = setup.weights.inlet(spec, engine_of(section).in_process(section))
        self._began: float | None = None  # start of the open span
        self._work = _Work()
        self._running = self._aborts = 0

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def do(self, command: m.SamplerCommand | m.RestCommand) -> m.Message | None:
        match command:
            case m.GenerateCommand(requests):
                self.engine.submit(requests)
                self._running += len(requests)
                self._work.exchanges += 1
                self._work.prompt_tokens += sum(len(r.token_ids) for r in requests)
                return None
            case m.LoadCommand(version):
                return self._load(version)
            case m.AbortCommand():
                self.engine.abort()
                self._began, self._work, self._running = None, _Work(), 0
                self._aborts += 1
                return None
            case m.SleepCommand() | m.WakeCommand():
                return _rest(self.engine, command)
            case _:
                assert_never(command)

    def step(self) -> m.Sampled | None:
        """One token for every running request; returns what is finished, if anything."""
        self._began = self._began or time.time()
        joins = self.engine.joins
        rollouts = self.engine.step()
        self._work.joins += self.engine.joins - joins
        self._work.passes += 1
        self._work.rows += self._running
        self._work.tokens += sum(r.response_length for r in rollouts)
        self._running -= len(rollouts)
        if not rollouts:
            return None
        self._work.exchanges += 1
        spans = []
        if not self.engine.busy or time.time() - self._began > SPAN_S:
            spans.append(m.Span("generate", self._began, time.time(), vars(self._work)))
            self._began, self._work = None, _Work()
        return m.Sampled(rollouts, spans, self._aborts)

    def _load(self, version: int) -> m.Loaded:
        start = time.time()
        self.engine.load(version, self.weights.read(version))
        self.weights.check(version)
        end = time.time()
        gb_per_s = self.weights.slot_bytes / 1e9 / max(end - start, 1e-9)
        found = {"version": version, "ms": 1e3 * (end - start), "gb_per_s": gb_per_s}
        return m.Loaded(version, m.Span("load", start, end, found))


def sampler_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """A sampler replica's process."""
    role = Sampling(spec, setup)
    mailbox.send(m.Ready())
    while not isinstance(command := mailbox.receive(block=not role.busy), m.StopCommand):
        answer = role.step() if command is None else role.do(command)
        if answer is not None:
            mailbox.send(answer)


# ---- teacher


class Teaching:
    """All ranks get the same command; each scores its share.

    The crew waits for every rank's answer, so the targets of a group are complete when the last one is in.
    """

    def __init__(self, spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> None:
        self.engine, self.setup = build_teacher(spec, setup, breathe), setup
        self._rank, self._world = spec.rank, spec.world
        self._delay_s = setup.recipe.teachers[spec.index].delay_ms / 1000
        self._labels = setup.recipe.freshness.reexecute.labels

    def do(self, command: m.TeacherCommand | m.RestCommand) -> m.Message:
        match command:
            case m.ScoreCommand(rollouts, regions, again):
                return self._score(rollouts, regions, again)
            case m.SleepCommand() | m.WakeCommand():
                return _rest(self.engine, command)
            case _:
                assert_never(command)

    def _score(self, rollouts: list[Rollout], regions: list[m.Region], again: bool) -> m.Scored:
        start = time.time()
        lengths = [len(r.judged.token_ids) for r in rollouts]
        share = balanced_shares(lengths, self._world, power=1)[self._rank]
        own, targets = [rollouts[i] for i in share], _targets(self.setup, [regions[i] for i in share])
        score(self.engine, own, targets, self._labels if again else None)
        time.sleep(self._delay_s * len(targets))
        tokens = sum(len(r.judged.token_ids) for r in own)
        span = m.Span("score", start, time.time(), {"tokens": tokens, "samples": len(targets)})
        return m.Scored([r.key for r in rollouts], span)


def teacher_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """The process of one teacher rank."""
    _serve(mailbox, Teaching(spec, setup, mailbox.beat).do)


def score(
    engine: Teacher,
    rollouts: Sequence[Rollout],
    targets: Sequence[TeacherTargets],
    again: Labels | None = None,
) -> None:
    """Fill the targets. `again`, after a re-execution: note how far the old labels are from what the teacher
    says today, and keep the old ones (cached) or today's (current).
    """
    if again is None:
        engine.score(rollouts, targets)
        for rollout, target in zip(rollouts, targets, strict=True):
            supervision.first_labels(rollout, target)
        return
    today, head = [supervision.blank(t) for t in targets], engine.head()
    engine.score(rollouts, today)
    for rollout, target, new in zip(rollouts, targets, today, strict=True):
        supervision.note_drift(rollout, target, new, head)
        if again == "current":
            supervision.take_over(target, new)


# ---- learner


class Learning:
    """All ranks get the same command and answer it; rank 0's report counts. `post` takes what is said beside
    the answers, from any thread.
    """

    def __init__(
        self, spec: WorkerSpec, setup: Setup, breathe: Callable[[], None], post: Callable[[m.Message], None]
    ) -> None:
        self.engine, self.setup, self._post = build_learner(spec, setup, breathe), setup, post
        weights = setup.weights.outlet(spec)
        self.writer, self.publisher = Writer(post), Publisher(weights, bool(spec.devices), post)
        weights.write(self.engine.version, self.engine.publish(weights.dtypes))

    def do(self, command: m.LearnerCommand | m.RestCommand) -> m.Message | None:
        start = time.time()
        match command:
            case m.TrainCommand(step, rollouts, regions, lags):
                self._train(start, step, self._samples(rollouts, regions, lags))
                return None
            case m.EvaluateCommand(rollouts, regions, lags, named):
                stats = self.engine.evaluate(self._samples(rollouts, regions, lags), named)
                return m.Evaluated(stats, m.Span("measure", start, time.time()))
            case m.SaveCommand():
                self.writer.write(self.engine.snapshot(command.staged), command)
                return m.Staged(m.Span("save", start, time.time()))
            case m.SleepCommand() | m.WakeCommand():
                self.publisher.finish()
                return _rest(self.engine, command)
            case _:
                assert_never(command)

    def _train(self, start: float, step: int, samples: list[Sample]) -> None:
        """The next step may begin with `Trained`, while the version is published."""
        report = self.engine.train(step, samples, self.publisher.let_update)
        self.publisher.finish()
        span = m.Span("train", start, time.time(), {"step": step, "tokens": report.tokens})
        self._post(m.Trained(report, span))
        self.publisher.publish(self.engine)

    def _samples(self, rollouts: list[Rollout], regions: list[m.Region], lags: list[int]) -> list[Sample]:
        targets = _targets(self.setup, regions)
        return [Sample(r, t, lag) for r, t, lag in zip(rollouts, targets, lags, strict=True)]


def learner_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """The process of one learner rank."""
    _serve(mailbox, Learning(spec, setup, mailbox.beat, mailbox.post).do)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- grader


class Grading:
    """Separate from the conductor: a slow or hanging grader must not hold up the run's bookkeeping."""

    def __init__(self, setup: Setup) -> None:
        self.task = load_task(*task_arguments(setup.recipe))

    def do(self, command: m.GraderCommand) -> m.Message:
        match command:
            case m.GradeCommand(items):
                start = time.time()
                grades = [(key, *graded(self.task, prompt, text)) for key, prompt, text in items]
                return m.Graded(grades, m.Span("grade", start, time.time(), {"samples": len(grades)}))
            case _:
                assert_never(command)


def grader_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """The grader's process."""
    _serve(mailbox, Grading(setup).do)


def graded(task: Any, prompt: Prompt, text: str) -> tuple[float, dict[str, float]]:
    """(score, further metrics) from a task's grader, which may return a `Grade` or a number."""
    found = task.grade(prompt, text)
    return (float(found.score), dict(found.metrics)) if isinstance(found, Grade) else (float(found), {})


# ---- environment


def environment_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """Commands come in while tools run; every turn is answered once, in whatever order they finish."""
    task: Any = load_task(*task_arguments(setup.recipe))
    environments = Environments(task, setup.frame(), mailbox.send)
    mailbox.send(m.Ready())
    asyncio.run(_serve_episodes(mailbox, environments))


async def _serve_episodes(mailbox: Mailbox, environments: Environments) -> None:
    loop = asyncio.get_running_loop()
    beating = asyncio.ensure_future(_beat(mailbox))
    while not isinstance(command := await loop.run_in_executor(None, mailbox.receive, True), m.StopCommand):
        await environments.do(command)
    beating.cancel()
    await environments.close()


async def _beat(mailbox: Mailbox) -> None:
    """A tool may take its time; a running event loop is sign of life enough."""
    while True:
        mailbox.beat()
        await asyncio.sleep(1)


def _targets(setup: Setup, regions: Sequence[m.Region]) -> list[TeacherTargets]:
    return [
        targets_at(setup.arena, s.offset, setup.target_specs[s.teacher], s.positions, s.teacher)
        for s in regions
    ]
