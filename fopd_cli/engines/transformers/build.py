"""How the reference engine is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fopd_cli.engines.building import SamplerOrder, TeacherOrder
from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Sampler, Teacher
from fopd_cli.engines.tokens import rope


def missing() -> None:
    """It is always there."""


def refusals(key: str, section: Any, config: Any) -> Iterator[tuple[str, str]]:
    """None beyond those of the student and of packing, which doctor looks at."""
    yield from ()


def sampler(order: SamplerOrder) -> Sampler:
    return on_weights(order.model, order.dtype, order.device, order.section.concurrency, order.vocab)


def on_weights(
    model: str, dtype: torch.dtype, device: torch.device, concurrency: int, vocab: int | None = None
) -> Sampler:
    """A sampler on the weights of a model directory."""
    from fopd_cli.engines.transformers.sampler import TransformersSampler

    config, tokenizer = hf.load_config(model, "student.model"), hf.load_tokenizer(model, "student.model")
    rules = hf.token_rules(model, tokenizer, config, "student.model")
    return TransformersSampler(
        hf.load_model(model, "student.model", dtype), rules, device, concurrency, vocab
    )


def teacher(order: TeacherOrder) -> Teacher:
    from fopd_cli.engines.transformers.teacher import TransformersTeacher

    order.join()
    section = order.section
    model = hf.load_model(section.model, "teacher.model", order.dtype)
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
    )
