"""What each worker process does with its commands, and the one place where recipe names become engines."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fopd_cli.engines import hf
from fopd_cli.engines.protocols import Learner, Sampler, Teacher
from fopd_cli.freshness.score import POLICIES
from fopd_cli.losses.chunked import LossSpec
from fopd_cli.recipe import Recipe
from fopd_cli.runtime import messages as m
from fopd_cli.runtime.arena import WeightChannel, targets_at
from fopd_cli.runtime.checkpoint import disk_error
from fopd_cli.runtime.workers import Mailbox, WorkerSpec
from fopd_cli.samples import Sample, TargetSpec, TeacherTargets


@dataclass
class Setup:
    """What every worker of a run is given at its start."""

    recipe: Recipe
    vocab: int  # ids under which student and teacher mean the same token
    target_spec: TargetSpec
    arena: torch.Tensor
    channel: WeightChannel
    rendezvous: Path  # a fresh file name; each group of ranks adds its role
    restore: tuple[Path, dict[str, Any]] | None = None  # learner state to resume from


def resolve_dtype(name: str, cuda: bool) -> torch.dtype:
    return hf.DTYPES[("bf16" if cuda else "fp32") if name == "auto" else name]


if TYPE_CHECKING:
    from fopd_cli.engines.fsdp_learner import LearnerConfig

SPAN_S = 0.25  # a sampler that is never idle reports its work in spans of about this length


# ---- building engines -------------------------------------------------------------------------------------------------


def _device(spec: WorkerSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.devices else torch.device("cpu")


def _join_group(spec: WorkerSpec, setup: Setup, always: bool) -> None:
    """One process group a role. A file is the meeting point: ports can be taken, a fresh file cannot."""
    if spec.world == 1 and not always:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if spec.devices else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{setup.rendezvous}-{spec.role}", rank=spec.rank, world_size=spec.world
    )


def learner_config(recipe: Recipe, compute: torch.dtype, vocab: int, **loss_overrides: Any) -> LearnerConfig:
    """The learner's, loss's and freshness's sections as the learner wants them."""
    from fopd_cli.engines.fsdp_learner import LearnerConfig

    loss, fresh, lrn = recipe.loss, recipe.freshness, recipe.learner
    spec = LossSpec(
        kind=loss.kind, support=loss.support, beta=loss.beta, temperature=loss.temperature, advantage=loss.advantage,
        importance=loss.importance, drift=fresh.drift, sampling_temperature=recipe.sampler.temperature,
        chunk_bytes=loss.chunk_mb << 20,
    )  # fmt: skip
    return LearnerConfig(
        loss=replace(spec, **loss_overrides), policy=POLICIES[fresh.policy], alpha=fresh.alpha, beta=fresh.beta, xi=fresh.xi,
        anchor=fresh.anchor, weights=fresh.weights, step_scale=fresh.step_scale, average=loss.average, lr=lrn.lr,
        warmup_steps=lrn.warmup_steps, decay=lrn.decay, min_lr_ratio=lrn.min_lr_ratio, steps=lrn.steps, betas=lrn.betas,
        weight_decay=lrn.weight_decay, clip=lrn.clip, micro_tokens=lrn.micro_tokens, compute_dtype=compute,
        activation_checkpointing=lrn.activation_checkpointing, vocab=vocab,
    )  # fmt: skip


def build_learner(spec: WorkerSpec, setup: Setup) -> Learner:
    from fopd_cli.engines.fsdp_learner import FsdpLearner

    recipe, device = setup.recipe, _device(spec)
    compute = resolve_dtype(recipe.learner.dtype, bool(spec.devices))
    _join_group(spec, setup, always=compute != torch.float32)
    config = learner_config(recipe, compute, setup.vocab)
    head = None
    if recipe.targets == "hidden":
        head = hf.load_head(recipe.teacher.model, "teacher.model", setup.target_spec.dtype)
    model = hf.load_model(recipe.student.model, "student.model", torch.float32)
    learner = FsdpLearner(model, head, config, device, spec.rank, spec.world)
    if setup.restore:
        learner.restore(*setup.restore)
    return learner


def build_teacher(spec: WorkerSpec, setup: Setup) -> Teacher:
    from fopd_cli.engines.transformers_teacher import TransformersTeacher

    _join_group(spec, setup, always=False)
    teacher = setup.recipe.teacher
    model = hf.load_model(teacher.model, "teacher.model", setup.target_spec.dtype)
    return TransformersTeacher(
        model, _device(spec), spec.world, teacher.micro_tokens, setup.vocab, delay_s=teacher.delay_ms / 1000
    )


def build_sampler(spec: WorkerSpec, setup: Setup) -> Sampler:
    recipe = setup.recipe
    return make_sampler(
        recipe.student.model,
        resolve_dtype(recipe.sampler.dtype, bool(spec.devices)),
        _device(spec),
        recipe.sampler.concurrency,
    )


def make_sampler(model_path: str, dtype: torch.dtype, device: torch.device, concurrency: int) -> Sampler:
    """The student sampler on the weights of a model directory; `fopd eval` uses it as the run does."""
    from fopd_cli.engines.transformers_sampler import TransformersSampler

    config = hf.load_config(model_path, "student.model")
    tokenizer = hf.load_tokenizer(model_path, "student.model")
    rules = hf.token_rules(model_path, tokenizer, config, "student.model")
    model = hf.load_model(model_path, "student.model", dtype)
    return TransformersSampler(model, rules, device, concurrency)


# ---- the workers' loops -----------------------------------------------------------------------------------------------


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
    mailbox.send(m.Ready())
    began: float | None = None  # of the span that is open
    tokens = 0
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
                mailbox.send(m.Sampled(rollouts, spans))
        elif isinstance(command, m.GenerateCommand):
            engine.submit(command.requests)
        elif isinstance(command, m.LoadCommand):
            start = time.time()
            engine.load(command.version, setup.channel.read(command.version))
            mailbox.send(m.Loaded(command.version, m.Span("load", start, time.time(), {"version": command.version})))
        elif isinstance(command, m.AbortCommand):
            engine.abort()
            began, tokens = None, 0
        elif isinstance(command, m.StopCommand):
            return
        else:
            _rest(engine, mailbox, command)


def teacher_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """All ranks get the same command; each scores its share, rank 0 answers when it is done with its own.

    The conductor waits for every rank's answer, so the targets of a group are complete when the last one is in.
    """
    engine = build_teacher(spec, setup)
    mailbox.send(m.Ready())
    while True:
        command = mailbox.receive(block=True)
        if isinstance(command, m.ScoreCommand):
            start = time.time()
            share = slice(spec.rank, None, spec.world)
            targets = _targets(setup, command.slots)[share]
            engine.score(command.rollouts[share], targets)
            tokens = sum(len(r.token_ids) for r in command.rollouts[share])
            keys = [r.key for r in command.rollouts]
            mailbox.send(
                m.Scored(keys, m.Span("score", start, time.time(), {"tokens": tokens, "samples": len(targets)}))
            )
        elif isinstance(command, m.StopCommand):
            return
        else:
            _rest(engine, mailbox, command)


def learner_main(spec: WorkerSpec, mailbox: Mailbox, setup: Setup) -> None:
    """All ranks get the same command; rank 0's report counts."""
    engine = build_learner(spec, setup)
    publish(spec, engine, setup.channel)
    mailbox.send(m.Ready({"version": engine.version}))
    while True:
        command = mailbox.receive(block=True)
        start = time.time()
        if isinstance(command, m.TrainCommand):
            targets = _targets(setup, command.slots)
            samples = [Sample(r, t, lag) for r, t, lag in zip(command.rollouts, targets, command.lags, strict=True)]
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
            except BaseException as problem:  # a full disk comes wrapped in torch's CheckpointException, no Exception
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
        grades = [(key, float(task.grade(prompt, text))) for key, prompt, text in command.items]
        mailbox.send(m.Graded(grades, m.Span("grade", start, time.time(), {"samples": len(grades)})))


def task_arguments(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) of the recipe's task."""
    options = recipe.task.model_dump()
    name = options.pop("name")
    return name, options.get("options", options)


def publish(spec: WorkerSpec, engine: Learner, channel: WeightChannel) -> int:
    """Write the learner's weights into their slot; all ranks gather, rank 0 writes."""
    return channel.write(engine.version, engine.publish(), keep=spec.rank == 0)


def _targets(setup: Setup, slots: Sequence[m.Slot]) -> list[TeacherTargets]:
    return [targets_at(setup.arena, s.offset, setup.target_spec, s.positions) for s in slots]
