"""Builds vLLM engines, and says what they refuse. Does not import vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil

from fopd_cli.engines.building import SamplerOrder, TeacherOrder
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.protocols import Sampler, Teacher
from fopd_cli.engines.vllm.engine import AdapterOptions, VllmOptions, problem
from fopd_cli.recipe import Sampler as SamplerSection
from fopd_cli.recipe import Teacher as TeacherSection
from fopd_cli.recipe import Vllm

TEACHER_BATCHED_TOKENS = 2048  # vLLM holds their [tokens, vocab] logits twice, outside its memory profile
KV_BLOCK = 128  # tokens; vLLM's block size on a CPU

missing = problem


def refusals(key: str, section: SamplerSection | TeacherSection, config: Any) -> Iterator[tuple[str, str]]:
    refused = support.vllm_refusal(config)
    if refused is None and isinstance(section, SamplerSection):
        refused = support.publishing_refusal(config)
    if refused is not None:
        yield f"{key}.engine: {config.model_type} {refused}", f"set {key}.engine: transformers"
    split = section.vllm.tensor_parallel
    # a state-space model may not have any
    heads = getattr(hf.text_config(config), "num_attention_heads", None) or 1
    if heads % split:
        yield (
            f"{key}.vllm.tensor_parallel: {split} does not divide the model's {heads} attention heads",
            f"set it to a divisor of {heads}",
        )


def sampler(order: SamplerOrder) -> Sampler:
    from fopd_cli.engines.vllm.sampler import VllmSampler

    section, model, adapter = order.section, order.model, order.adapter
    config, tokenizer = hf.load_config(model, "student.model"), hf.load_tokenizer(model, "student.model")
    rules = hf.token_rules(model, tokenizer, config, "student.model")
    cuda = order.device.type == "cuda"
    options = VllmOptions(
        _keys(section.vllm, order.share),
        key="sampler.vllm",
        model=model,
        dtype=order.dtype,
        cuda=cuda,
        max_tokens=order.context,
        max_requests=section.concurrency,
        max_logprobs=order.logprobs,
        # vLLM's CPU build does not cache the states of prefixes.
        prefix_caching=section.vllm.prefix_caching and (cuda or not support.keeps_state(config)),
        live_weights=adapter is None,
        stale_kv=order.stale_kv,
        seeded=True,
        adapter=None if adapter is None else AdapterOptions(adapter.rank, adapter.alpha),
        vocab=_fewer(order.vocab, config),
    )
    return VllmSampler(with_cpu_cache(options, config), rules, hf.tied_names(config))


def teacher(order: TeacherOrder) -> Teacher:
    from fopd_cli.engines.vllm.teacher import VllmTeacher

    section = order.section
    config = hf.load_config(section.model, "teacher.vllm")
    options = VllmOptions(
        _keys(section.vllm, order.share),
        key="teacher.vllm",
        model=section.model,
        dtype=order.dtype,
        cuda=order.device.type == "cuda",
        max_tokens=order.context + 1,  # vLLM insists on generating a token
        max_requests=section.batch_samples,
        max_logprobs=section.k,
        batched_tokens=TEACHER_BATCHED_TOKENS,
        vocab=_fewer(order.vocab, config),
        hidden=section.targets == "hidden",
    )
    head = hf.load_head(section.model, "teacher.model", order.dtype) if options.hidden else None
    return VllmTeacher(with_cpu_cache(options, config), head, order.vocab)


def _keys(section: Vllm, share: float | None) -> Vllm:
    """The recipe's keys, with this engine's share of the device where several roles stay on it."""
    return section if share is None else section.model_copy(update={"gpu_memory": share})


def _fewer(vocab: int, config: Any) -> int | None:
    """The number of ids that the pair shares, where the model has more; else None."""
    return vocab if vocab < hf.vocab_size(config) else None


def with_cpu_cache(options: VllmOptions, config: Any) -> VllmOptions:
    """On a CPU, size the KV cache for all running requests; vLLM's default would take most of the RAM."""
    if options.cuda:
        return options
    tokens = options.max_requests * (options.max_tokens + 2 * KV_BLOCK)
    wanted = tokens * hf.kv_bytes_per_token(config, options.dtype)
    most = psutil.virtual_memory().total // 8
    return replace(options, cache_bytes=max(64 << 20, min(wanted, most)))
