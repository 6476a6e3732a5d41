"""The composition root: from recipe names to engines. Each engine is imported only in the process that runs
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from fopd_cli.engines.building import SamplerOrder, TeacherOrder
from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.protocols import Learner, Sampler, Teacher
from fopd_cli.engines.registry import engine_of, sampler_facts
from fopd_cli.engines.renumbered_teacher import RenumberedTeacher, renumbered_head
from fopd_cli.engines.text.templates import Frame
from fopd_cli.engines.tokens import rope
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Lora, PluginTask, Prompts, Recipe
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.weights.transport import Transport
from fopd_cli.samples import TargetSpec

if TYPE_CHECKING:
    from fopd_cli.engines.learner.learner import LearnerConfig


@dataclass
class Setup:
    """What every worker of a run is given at its start."""

    recipe: Recipe
    vocab: int  # ids under which student and teacher mean the same token
    target_specs: tuple[TargetSpec, ...]  # of each teacher
    tables: tuple[
        np.ndarray | None, ...
    ]  # of each teacher: the student's token id -> the teacher's; None: the same
    context: int  # tokens of the longest possible sample, as the student has it
    judged: int  # the same, as teachers judge it
    arena: torch.Tensor
    weights: Transport
    rendezvous: Path  # a fresh file name; each group of ranks adds its role
    restore: tuple[Path, dict[str, Any]] | None = None  # learner state to resume from

    def frame(self) -> Frame:
        """How the student reads its prompts."""
        return student_frame(self.recipe, hf.load_tokenizer(self.recipe.student.model, "student.model"))


def resolve_dtype(name: str, cuda: bool) -> torch.dtype:
    return hf.DTYPES[("bf16" if cuda else "fp32") if name == "auto" else name]


def sampler_dtype(recipe: Recipe, plan: Plan) -> torch.dtype:
    """The dtype in which the student samples and is evaluated."""
    return resolve_dtype(recipe.sampler.dtype, bool(plan.samplers[0].devices))


def _device(spec: WorkerSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.devices else torch.device("cpu")


def _join_group(spec: WorkerSpec, setup: Setup, always: bool) -> None:
    """One process group per engine. A file is the meeting point: ports can be taken, a fresh file cannot."""
    if (spec.world == 1 or spec.whole) and not always:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if spec.devices else "gloo"
    # By its path: in a URL, file://runs/x is the file /x of a machine called runs, and torch waits for it.
    meeting = f"{setup.rendezvous}-{spec.role}-{spec.index}-{spec.restarts}"
    store = dist.FileStore(meeting, spec.world)
    dist.init_process_group(backend, store=store, rank=spec.rank, world_size=spec.world)


def learner_config(
    recipe: Recipe, compute: torch.dtype, vocab: int, longest: int, **loss_overrides: Any
) -> LearnerConfig:
    """The recipe's learner, loss and freshness sections in the form that the learner takes."""
    from fopd_cli.engines.learner.learner import LearnerConfig

    loss, fresh = recipe.loss, recipe.freshness
    spec = LossSpec.of(
        loss,
        support=recipe.support,
        importance=recipe.importance,
        trust=fresh.trust if POLICIES[fresh.policy].trust else None,
        drift=recipe.drift,
        sampling_temperature=recipe.sampler.temperature,
        teacher_temperature=recipe.sampler.temperature if loss.teacher_temperature == "sampler" else 1.0,
        chunk_bytes=None if loss.chunk_mb is None else loss.chunk_mb << 20,
        compile=recipe.learner.compile,
    )
    return LearnerConfig(
        learner=recipe.learner,
        freshness=fresh,
        loss=replace(spec, **loss_overrides),
        average=loss.average,
        anchor=recipe.anchor,
        pace=recipe.pace,
        compute_dtype=compute,
        vocab=vocab,
        longest=longest,
        adapter_only=published_adapter(recipe) is not None,
    )


def build_learner(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Learner:
    """`breathe` is called between layers, so that a long step shows signs of life and shares the cores."""
    from fopd_cli.engines.learner.learner import FsdpLearner, sharded

    recipe, device = setup.recipe, _device(spec)
    compute = resolve_dtype(recipe.learner.dtype, bool(spec.devices))
    _join_group(spec, setup, always=sharded(compute, recipe.learner.offload, spec.world))
    config = learner_config(recipe, compute, setup.vocab, setup.context)
    heads = []
    if recipe.targets == "hidden":
        pairs = zip(recipe.teachers, setup.target_specs, strict=True)
        heads = [hf.load_head(t.model, "teacher.model", targets.dtype) for t, targets in pairs]
        heads = [h if t is None else renumbered_head(h, t) for h, t in zip(heads, setup.tables, strict=True)]
    own = torch.float32 if recipe.student.lora is None else compute
    direct = shards.direct(device, spec.world)
    found = shards.empty(recipe.student.model, "student.model", own) if direct else None
    model, unread = found or (None, None)
    if unread is None:
        model = load_student(recipe, compute)
    else:
        hf.freeze_unused(model)
        add_adapters(model, recipe, compute)
        unread = replace(unread, fresh=lora.initial(recipe.seed)) if recipe.student.lora else unread
    as_sampled(model, setup, setup.context)
    if not spec.devices:
        hf.between_blocks(model, breathe)
    learner = FsdpLearner(model, heads, config, device, spec.rank, spec.world, unread)
    if setup.restore:
        learner.restore(*setup.restore)
    return learner


def load_student(recipe: Recipe, frozen_dtype: torch.dtype) -> Any:
    """The student as it is trained: fp32 masters, and adapters over a frozen base if the recipe says so."""
    model = hf.load_model(recipe.student.model, "student.model", torch.float32)
    hf.freeze_unused(model)
    add_adapters(model, recipe, frozen_dtype)
    return model


def as_sampled(model: Any, setup: Setup, longest: int) -> None:
    """If the sampler's engine chooses the factors of a rotary embedding once for the whole run, so does this
    model. `longest` is how many tokens a sequence can have.
    """
    if sampler_facts(setup.recipe.sampler).one_rotation:
        rope.by_sequence(model, longest)


def add_adapters(model: Any, recipe: Recipe, frozen_dtype: torch.dtype) -> None:
    """Does nothing without a `student.lora` section."""
    if (wanted := recipe.student.lora) is not None:
        lora.add_adapters(
            model, wanted.rank, wanted.alpha, wanted.targets, recipe.seed, frozen_dtype, wanted.router
        )
        if wanted.publish == "adapter":
            lora.check_adapter_alone(model, "student.lora.publish")


def build_teacher(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Teacher:
    """`breathe`: as for the learner."""
    engine = _teacher(spec, setup, breathe)
    table = setup.tables[spec.index]
    return engine if table is None else RenumberedTeacher(engine, table)


def _teacher(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Teacher:
    teacher, dtype = setup.recipe.teachers[spec.index], setup.target_specs[spec.index].dtype
    order = TeacherOrder(
        teacher,
        dtype,
        _device(spec),
        1 if spec.whole else spec.world,
        setup.judged,
        setup.vocab,
        spec.share,
        setup.recipe.loss.student_k,
        sampler_facts(setup.recipe.sampler).one_rotation,
        lambda: _join_group(spec, setup, always=False),
        None if spec.devices else breathe,
    )
    return engine_of(teacher).build.teacher(order)


def build_sampler(spec: WorkerSpec, setup: Setup) -> Sampler:
    dtype = resolve_dtype(setup.recipe.sampler.dtype, bool(spec.devices))
    adapter = published_adapter(setup.recipe)
    model = setup.recipe.student.model
    return make_sampler(
        setup.recipe, model, dtype, _device(spec), setup.context, setup.vocab, spec.share, adapter
    )


def published_adapter(recipe: Recipe) -> Lora | None:
    """The section of a LoRA student of which only the adapter is published; else None."""
    wanted = recipe.student.lora
    return wanted if wanted is not None and wanted.publish == "adapter" else None


def make_sampler(
    recipe: Recipe,
    model_path: str,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    vocab: int,
    share: float | None = None,
    adapter: Lora | None = None,
) -> Sampler:
    """The recipe's sampler on the weights of a model directory; `fopd eval` uses it as the run does. It
    samples ids below `vocab`.

    `share` is as in `SamplerOrder`. With `adapter`, `load` gets such adapters for these weights, not weights.
    """
    logprobs = sampling_params(recipe, evaluation=False).keep_topk
    order = SamplerOrder(
        recipe.sampler,
        model_path,
        dtype,
        device,
        context,
        vocab,
        logprobs,
        share,
        adapter,
        stale_kv=recipe.schedule.inflight == "keep_stale_kv",
    )
    return engine_of(recipe.sampler).build.sampler(order)


def task_arguments(recipe: Recipe) -> tuple[str, dict[str, Any], str | None]:
    """(name, keyword arguments, folder of its module) of the recipe's task, without the keys that fopd
    handles itself.
    """
    if isinstance(recipe.task, PluginTask):
        return recipe.task.name, dict(recipe.task.options), recipe.task.path
    options = recipe.task.model_dump()
    name = options.pop("name")
    for key in Prompts.model_fields:
        options.pop(key, None)
    return name, options, None


def student_frame(recipe: Recipe, tokenizer: Any) -> Frame:
    """How the student reads its prompts."""
    return Frame(tokenizer, recipe.template_kwargs, system=getattr(recipe.task, "system", None))
