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

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.protocols import Learner, Sampler, Teacher
from fopd_cli.engines.renumbered_teacher import RenumberedTeacher, renumbered_head
from fopd_cli.engines.text.templates import Frame
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.vllm.engine import AdapterOptions, VllmOptions
from fopd_cli.errors import UserError
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Lora, PluginTask, Prompts, Recipe, Vllm
from fopd_cli.recipe import Teacher as TeacherSection
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.sizes import total_memory
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.samples import TargetSpec

if TYPE_CHECKING:
    from fopd_cli.engines.http.teacher import HttpServer
    from fopd_cli.engines.learner.learner import LearnerConfig

TEACHER_BATCHED_TOKENS = 2048  # vLLM keeps [tokens, vocab] logits of them, twice, outside its memory profile
KV_BLOCK = 128  # tokens; vLLM's on a CPU


@dataclass
class Setup:
    """What every worker of a run is given at its start."""

    recipe: Recipe
    vocab: int  # ids under which student and teacher mean the same token
    target_specs: tuple[TargetSpec, ...]  # of each teacher
    tables: tuple[
        np.ndarray | None, ...
    ]  # of each teacher: the student's token id -> the teacher's; None: the same
    context: int  # tokens of the longest sample that there can be, as the student has it
    judged: int  # the same, as teachers judge it
    arena: torch.Tensor
    channel: WeightChannel
    rendezvous: Path  # a fresh file name; each group of ranks adds its role
    restore: tuple[Path, dict[str, Any]] | None = None  # learner state to resume from


def resolve_dtype(name: str, cuda: bool) -> torch.dtype:
    return hf.DTYPES[("bf16" if cuda else "fp32") if name == "auto" else name]


def sampler_dtype(recipe: Recipe, plan: Plan) -> torch.dtype:
    """In which the student samples and is evaluated."""
    return resolve_dtype(recipe.sampler.dtype, bool(plan.samplers[0].devices))


def _device(spec: WorkerSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.devices else torch.device("cpu")


def _join_group(spec: WorkerSpec, setup: Setup, always: bool) -> None:
    """One process group a role. A file is the meeting point: ports can be taken, a fresh file cannot."""
    if (spec.world == 1 or spec.whole) and not always:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if spec.devices else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"file://{setup.rendezvous}-{spec.role}-{spec.index}-{spec.life}",
        rank=spec.rank,
        world_size=spec.world,
    )


def learner_config(
    recipe: Recipe, compute: torch.dtype, vocab: int, longest: int, **loss_overrides: Any
) -> LearnerConfig:
    """The learner's, loss's and freshness's sections as the learner wants them."""
    from fopd_cli.engines.learner.learner import LearnerConfig

    loss, fresh, lrn = recipe.loss, recipe.freshness, recipe.learner
    policy = POLICIES[fresh.policy]
    spec = LossSpec(
        kind=loss.kind,
        support=recipe.support,
        beta=loss.beta,
        temperature=loss.temperature,
        advantage=loss.advantage,
        importance=loss.importance,
        max_ratio=loss.max_ratio,
        trust=fresh.trust if policy.trust else None,
        drift=recipe.drift,
        sampling_temperature=recipe.sampler.temperature,
        teacher_temperature=recipe.sampler.temperature if loss.teacher_temperature == "sampler" else 1.0,
        chunk_bytes=None if loss.chunk_mb is None else loss.chunk_mb << 20,
        compile=lrn.compile,
    )
    return LearnerConfig(
        loss=replace(spec, **loss_overrides),
        policy=policy,
        alpha=fresh.alpha,
        beta=fresh.beta,
        xi=fresh.xi,
        anchor=recipe.anchor,
        weights=fresh.weights,
        labels=fresh.replay.labels,
        step_scale=fresh.step_scale,
        average=loss.average,
        lr=lrn.lr,
        warmup_steps=lrn.warmup_steps,
        decay=lrn.decay,
        min_lr_ratio=lrn.min_lr_ratio,
        steps=lrn.steps,
        betas=lrn.betas,
        weight_decay=lrn.weight_decay,
        clip=lrn.clip,
        micro_tokens=lrn.micro_tokens,
        packing=lrn.packing,
        compute_dtype=compute,
        activation_checkpointing=lrn.activation_checkpointing,
        compile=lrn.compile,
        offload=lrn.offload,
        optimizer_dtype=hf.DTYPES[lrn.optimizer_dtype],
        adapter_only=published_adapter(recipe) is not None,
        vocab=vocab,
        longest=longest,
    )


def build_learner(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Learner:
    """`breathe` is called between layers, so that a long step shows that it gets on, and shares the cores."""
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
    model = load_student(recipe, compute)
    as_sampled(model, setup, setup.context)
    if not spec.devices:
        hf.between_blocks(model, breathe)
    learner = FsdpLearner(model, heads, config, device, spec.rank, spec.world)
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
    """vLLM chooses the factors of a rotary embedding once for the whole run; where it samples, this model
    does, too.

    `longest` is how many tokens a sequence can have.
    """
    if setup.recipe.sampler.engine == "vllm":
        rope.by_sequence(model, longest)


def add_adapters(model: Any, recipe: Recipe, frozen_dtype: torch.dtype) -> None:
    """Nothing without a `student.lora` section."""
    if (wanted := recipe.student.lora) is not None:
        lora.add_adapters(
            model, wanted.rank, wanted.alpha, wanted.targets, recipe.seed, frozen_dtype, wanted.router
        )
        if wanted.publish == "adapter":
            lora.check_adapter_alone(model, "student.lora.publish")


def build_teacher(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Teacher:
    """`breathe`: as of the learner."""
    engine = _teacher(spec, setup, breathe)
    table = setup.tables[spec.index]
    return engine if table is None else RenumberedTeacher(engine, table)


def _teacher(spec: WorkerSpec, setup: Setup, breathe: Callable[[], None]) -> Teacher:
    teacher, dtype = setup.recipe.teachers[spec.index], setup.target_specs[spec.index].dtype
    if teacher.engine == "http":
        from fopd_cli.engines.http.teacher import HttpTeacher

        return HttpTeacher(http_server(teacher), setup.vocab)
    if teacher.engine == "vllm":
        from fopd_cli.engines.vllm.teacher import VllmTeacher

        options = VllmOptions(
            max_tokens=setup.judged + 1,  # the token that vLLM insists on generating
            max_requests=teacher.batch_samples,
            max_logprobs=teacher.k,
            **_vllm_options(
                "teacher.vllm", teacher.model, teacher.vllm, dtype, _device(spec), setup.vocab, spec
            ),
        )
        capped = replace(options, max_batched_tokens=options.max_batched_tokens or TEACHER_BATCHED_TOKENS)
        return VllmTeacher(with_cpu_cache(capped, teacher.model))
    from fopd_cli.engines.transformers.teacher import TransformersTeacher

    _join_group(spec, setup, always=False)
    model = hf.load_model(teacher.model, "teacher.model", dtype)
    as_sampled(model, setup, setup.judged)
    if not spec.devices:
        hf.between_blocks(model, breathe)
    return TransformersTeacher(
        model,
        _device(spec),
        1 if spec.whole else spec.world,
        teacher.micro_tokens,
        setup.vocab,
        setup.judged,
        teacher.packing,
        setup.recipe.loss.student_k,
    )


def http_server(teacher: TeacherSection) -> HttpServer:
    """How to reach a remote teacher. Raises `UserError` if its API key is not there."""
    from fopd_cli.engines.http.teacher import HttpServer

    h = teacher.http
    key = os.environ.get(h.api_key_env) if h.api_key_env else None
    if h.api_key_env and not key:
        raise UserError(f"teacher.http.api_key_env: the environment variable {h.api_key_env} is not set")
    assert h.url is not None
    return HttpServer(h.url.rstrip("/"), teacher.model, key, h.concurrency, h.timeout_s, h.retries)


def build_sampler(spec: WorkerSpec, setup: Setup) -> Sampler:
    dtype = resolve_dtype(setup.recipe.sampler.dtype, bool(spec.devices))
    adapter = published_adapter(setup.recipe)
    model = setup.recipe.student.model
    return make_sampler(setup.recipe, model, dtype, _device(spec), setup.context, setup.vocab, adapter, spec)


def published_adapter(recipe: Recipe) -> Lora | None:
    """The section of a LoRA student whose adapter alone is published."""
    wanted = recipe.student.lora
    return wanted if wanted is not None and wanted.publish == "adapter" else None


def make_sampler(
    recipe: Recipe,
    model_path: str,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    vocab: int,
    adapter: Lora | None = None,
    spec: WorkerSpec | None = None,
) -> Sampler:
    """The recipe's sampler on the weights of a model directory; `fopd eval` uses it as the run does. It
    samples ids below `vocab`.

    With `adapter`, what `load` is given are such adapters for these weights, not weights.
    """
    section = recipe.sampler
    if section.engine == "vllm":
        from fopd_cli.engines.vllm.sampler import VllmSampler

        config, tokenizer = (
            hf.load_config(model_path, "student.model"),
            hf.load_tokenizer(model_path, "student.model"),
        )
        rules = hf.token_rules(model_path, tokenizer, config, "student.model")
        # vLLM's CPU build keeps no states of prefixes.
        prefixes = section.vllm.prefix_caching and not (device.type == "cpu" and support.keeps_state(config))
        options = VllmOptions(
            max_tokens=context,
            max_requests=section.concurrency,
            max_logprobs=sampling_params(recipe, evaluation=False).keep_topk,
            prefix_caching=prefixes,
            live_weights=adapter is None,
            seeded=True,
            adapter=None if adapter is None else AdapterOptions(adapter.rank, adapter.alpha),
            **_vllm_options("sampler.vllm", model_path, section.vllm, dtype, device, vocab, spec),
        )
        return VllmSampler(with_cpu_cache(options, model_path), rules, hf.tied_names(config))
    return transformers_sampler(model_path, dtype, device, section.concurrency, vocab)


def transformers_sampler(
    model_path: str, dtype: torch.dtype, device: torch.device, concurrency: int, vocab: int | None = None
) -> Sampler:
    """The reference engine, which runs anywhere."""
    from fopd_cli.engines.transformers.sampler import TransformersSampler

    config, tokenizer = (
        hf.load_config(model_path, "student.model"),
        hf.load_tokenizer(model_path, "student.model"),
    )
    rules = hf.token_rules(model_path, tokenizer, config, "student.model")
    return TransformersSampler(
        hf.load_model(model_path, "student.model", dtype), rules, device, concurrency, vocab
    )


def _vllm_options(
    key: str,
    model: str,
    section: Vllm,
    dtype: torch.dtype,
    device: torch.device,
    vocab: int,
    spec: WorkerSpec | None,
) -> dict[str, Any]:
    """What the sampler's and the teacher's vLLM have in common. `spec` may say which share of a device it has."""
    return {
        "vocab": vocab if vocab < hf.vocab_size(hf.load_config(model, key)) else None,
        "key": key,
        "model": model,
        "dtype": dtype,
        "cuda": device.type == "cuda",
        "eager": section.eager,
        "tensor_parallel": section.tensor_parallel,
        "gpu_memory": section.gpu_memory if spec is None or spec.share is None else spec.share,
        "kv_cache_bytes": None if section.kv_cache_gb is None else int(section.kv_cache_gb * 1e9),
        "max_batched_tokens": section.max_batched_tokens,
    }


def with_cpu_cache(options: VllmOptions, model: str) -> VllmOptions:
    """On a CPU the KV cache that all running requests can need; vLLM's own default would take most of the
    RAM.
    """
    if options.cuda or options.kv_cache_bytes is not None:
        return options
    tokens = options.max_requests * (options.max_tokens + 2 * KV_BLOCK)
    wanted = tokens * hf.kv_bytes_per_token(hf.load_config(model, options.key), options.dtype)
    return replace(options, kv_cache_bytes=max(64 << 20, min(wanted, total_memory() // 8)))


def task_arguments(recipe: Recipe) -> tuple[str, dict[str, Any], str | None]:
    """(name, keyword arguments, folder of its module) of the recipe's task, without what is not the task's
    own to do.
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
