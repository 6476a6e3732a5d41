"""What each worker process does with its commands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Learner, Teacher
from fopd_cli.engines.registry import sampler_facts
from fopd_cli.freshness import supervision
from fopd_cli.recipe import Labels
from fopd_cli.runtime.build import (
    Setup,
    build_learner,
    build_sampler,
    build_teacher,
    student_frame,
    task_arguments,
)
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.environment import Environments
from fopd_cli.runtime.crew.fleet import Mailbox, WorkerSpec
from fopd_cli.runtime.journal.checkpoint import disk_error
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.samples import Prompt, Rollout, Sample, TeacherTargets
from fopd_cli.tasks.base import Grade

SPAN_S = 0.25  # a sampler that is never idle reports its work in spans of about this length


def _rest(engine: Any, mailbox: Mailbox, command: Any) -> None:
    if isinstance(command, m.SleepCommand):
        engine.sleep()
        mailbox.send(m.Asleep(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0))
    else:
        engine.wake()
        mailbox.send(m.Awake())


def sampler_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """Take commands between tokens; finished rollouts leave at once."""
    engine = build_sampler(spec, setup)
    if spec.devices and sampler_facts(setup.recipe.sampler).copies:
        setup.channel.page_lock()
    mailbox.send(m.Ready())
    began: float | None = None  # of the span that is open
    tokens = aborts = 0
    while True:
        command = mailbox.receive(block=not engine.busy)
        if command is None:
            began = began or time.time()
            rollouts = engine.step()
            tokens += sum(r.response_length for r in rollouts)
            if rollouts:
                spans = []
                if not engine.busy or time.time() - began > SPAN_S:
                    spans.append(m.Span("generate", began, time.time(), {"tokens": tokens}))
                    began, tokens = None, 0
                mailbox.send(m.Sampled(rollouts, spans, aborts))
        elif isinstance(command, m.GenerateCommand):
            engine.submit(command.requests)
        elif isinstance(command, m.LoadCommand):
            start = time.time()
            engine.load(command.version, setup.channel.read(command.version))
            setup.channel.check(command.version)
            mailbox.send(m.Loaded(command.version, _load_span(command.version, setup.channel, start)))
        elif isinstance(command, m.AbortCommand):
            engine.abort()
            began, tokens, aborts = None, 0, aborts + 1
        elif isinstance(command, m.StopCommand):
            return
        else:
            _rest(engine, mailbox, command)


def _load_span(version: int, channel: WeightChannel, start: float) -> m.Span:
    end = time.time()
    gb_per_s = channel.slot_bytes / 1e9 / max(end - start, 1e-9)
    return m.Span("load", start, end, {"version": version, "ms": 1e3 * (end - start), "gb_per_s": gb_per_s})


def teacher_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """All ranks get the same command; each scores its share, rank 0 answers when it is done with its own.

    The conductor waits for every rank's answer, so the targets of a group are complete when the last one is
    in.
    """
    engine = build_teacher(spec, setup, mailbox.beat)
    delay_s = setup.recipe.teachers[spec.index].delay_ms / 1000
    labels = setup.recipe.freshness.replay.labels
    mailbox.send(m.Ready())
    while True:
        command = mailbox.receive(block=True)
        if isinstance(command, m.ScoreCommand):
            start = time.time()
            share = slice(spec.rank, None, spec.world)
            rollouts, targets = command.rollouts[share], _targets(setup, command.slots)[share]
            score(engine, rollouts, targets, labels if command.again else None)
            time.sleep(delay_s * len(targets))
            tokens = sum(len(r.judged.token_ids) for r in rollouts)
            keys = [r.key for r in command.rollouts]
            mailbox.send(
                m.Scored(
                    keys, m.Span("score", start, time.time(), {"tokens": tokens, "samples": len(targets)})
                )
            )
        elif isinstance(command, m.StopCommand):
            return
        else:
            _rest(engine, mailbox, command)


def score(
    engine: Teacher,
    rollouts: Sequence[Rollout],
    targets: Sequence[TeacherTargets],
    again: Labels | None = None,
) -> None:
    """Fill the targets. `again`, after a replay: note how far they are from what the teacher says today, and
    keep the labels that stand (cached) or today's (current).
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


def learner_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """All ranks get the same command; rank 0's report counts."""
    engine = build_learner(spec, setup, mailbox.beat)
    if spec.devices and spec.rank == 0:
        setup.channel.page_lock()
    publish(spec, engine, setup.channel)
    mailbox.send(m.Ready({"version": engine.version}))
    while True:
        command = mailbox.receive(block=True)
        start = time.time()
        if isinstance(command, m.TrainCommand):
            targets = _targets(setup, command.slots)
            samples = [
                Sample(r, t, lag) for r, t, lag in zip(command.rollouts, targets, command.lags, strict=True)
            ]
            if command.step is None:
                stats = engine.measure(samples)
                mailbox.send(m.Measured(stats, m.Span("measure", start, time.time())))
                continue
            report = engine.train(command.step, samples)
            trained = time.time()
            report.publish_bytes = publish(spec, engine, setup.channel)
            report.publish_seconds = time.time() - trained
            spans = [
                m.Span("train", start, trained, {"step": command.step, "tokens": report.tokens}),
                m.Span("publish", trained, time.time(), {"version": engine.version}),
            ]
            mailbox.send(m.Trained(report, spans))
        elif isinstance(command, m.SaveCommand):
            extra, error = {}, None
            try:
                extra = engine.save(command.folder)
            except (
                BaseException
            ) as problem:  # a full disk comes wrapped in torch's CheckpointException, no Exception
                error = disk_error(problem)
                if error is None:
                    raise
            mailbox.send(m.Saved(extra, m.Span("save", start, time.time()), error))
        elif isinstance(command, m.StopCommand):
            break
        else:
            _rest(engine, mailbox, command)
    if dist.is_initialized():
        dist.destroy_process_group()


def grader_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """Grading apart from the conductor: a slow or hanging grader must not hold up the run's bookkeeping."""
    from fopd_cli.tasks import load_task

    task = load_task(*task_arguments(setup.recipe))
    mailbox.send(m.Ready())
    while True:
        command = mailbox.receive(block=True)
        if isinstance(command, m.StopCommand):
            return
        start = time.time()
        grades = [(key, *graded(task, prompt, text)) for key, prompt, text in command.items]
        mailbox.send(m.Graded(grades, m.Span("grade", start, time.time(), {"samples": len(grades)})))


def graded(task: Any, prompt: Prompt, text: str) -> tuple[float, dict[str, float]]:
    """(score, figures beside it) of what a task's grader said in either form."""
    found = task.grade(prompt, text)
    return (float(found.score), dict(found.figures)) if isinstance(found, Grade) else (float(found), {})


def environment_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """Commands come in while tools run; every turn is answered once, in whatever order they end."""
    from fopd_cli.tasks import load_task

    task: Any = load_task(*task_arguments(setup.recipe))
    frame = student_frame(setup.recipe, hf.load_tokenizer(setup.recipe.student.model, "student.model"))
    mailbox.send(m.Ready())
    asyncio.run(_serve_episodes(mailbox, Environments(task, frame, mailbox.send)))


async def _serve_episodes(mailbox: Mailbox, environments: Environments) -> None:
    loop = asyncio.get_running_loop()
    beating = asyncio.ensure_future(_beat(mailbox))
    while not isinstance(command := await loop.run_in_executor(None, mailbox.receive, True), m.StopCommand):
        if isinstance(command, m.TurnCommand):
            environments.turn(command)
        elif isinstance(command, m.ReplayCommand):
            environments.replay(command)
        elif isinstance(command, m.CancelCommand):
            await environments.cancel(command.keys)
    beating.cancel()
    await environments.close()


async def _beat(mailbox: Mailbox) -> None:
    """A tool may take its time; that the loop turns is sign of life enough."""
    while True:
        mailbox.beat()
        await asyncio.sleep(1)


def publish(spec: WorkerSpec, engine: Learner, channel: WeightChannel) -> int:
    """Write the learner's weights into their slot; all ranks gather, rank 0 writes."""
    return channel.write(engine.version, engine.publish(), keep=spec.rank == 0)


def _targets(setup: Setup, slots: Sequence[m.Slot]) -> list[TeacherTargets]:
    return [
        targets_at(setup.arena, s.offset, setup.target_specs[s.teacher], s.positions, s.teacher)
        for s in slots
    ]
