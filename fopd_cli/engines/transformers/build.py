"""How the reference engine is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fopd_cli.engines.building import SamplerOrder, TeacherOrder
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.protocols import Sampler, Teacher
from fopd_cli.engines.tokens import rope


def missing() -> None:
    """It is always available."""


def refusals(key: str, section: Any, config: Any) -> Iterator[tuple[str, str]]:
    """None besides those for the student and for packing, which doctor checks."""
    yield from ()


def sampler(order: SamplerOrder) -> Sampler:
    section = order.section
    return on_weights(
        order.model,
        order.dtype,
        order.device,
        section.concurrency,
        order.vocab,
        prefill_tokens=section.prefill_tokens,
        stale_kv=order.stale_kv,
    )


def on_weights(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    concurrency: int,
    vocab: int | None = None,
    **options: Any,
) -> Sampler:
    """A sampler with the weights of a model directory; `options` are those of `TransformersSampler`."""
    from fopd_cli.engines.transformers.sampler import TransformersSampler

    config, tokenizer = hf.load_config(model, "student.model"), hf.load_tokenizer(model, "student.model")
    rules = hf.token_rules(model, tokenizer, config, "student.model")
    found = shards.empty(model, "student.model", dtype) if shards.direct(device, 1) else None
    loaded, unread = found or (hf.load_model(model, "student.model", dtype), None)
    return TransformersSampler(loaded, rules, device, concurrency, vocab, unread=unread, **options)


def teacher(order: TeacherOrder) -> Teacher:
    from fopd_cli.engines.transformers.teacher import TransformersTeacher

    order.join()
    section = order.section
    direct = shards.direct(order.device, order.world)
    found = shards.empty(section.model, "teacher.model", order.dtype) if direct else None
    model, unread = found or (hf.load_model(section.model, "teacher.model", order.dtype), None)
    if order.one_rotation:
        rope.by_sequence(model, order.context)
    if order.breathe is not None:
        hf.between_blocks(model, order.breathe)
    return TransformersTeacher(
        model,
        order.device,
        order.world,
        section.micro_tokens,
        order.vocab,
        order.context,
        section.packing,
        order.student_k,
        unread,
    )
