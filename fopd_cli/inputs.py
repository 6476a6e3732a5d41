"""What a run reads before any process starts: the recipe's models without weights, and its prompts.

recipe, plan ──load_inputs──> Inputs ──> doctor's checks, the conductor, its workers
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fopd_cli import paths
from fopd_cli.engines import auto
from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.registry import engine_of, teacher_facts
from fopd_cli.engines.text.templates import Frame, check_variables
from fopd_cli.engines.text.vocabularies import Match, inverse, match
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, Teacher
from fopd_cli.runtime import placing
from fopd_cli.runtime.build import (
    Setup,
    add_adapters,
    published_adapter,
    resolve_dtype,
    sampler_dtype,
    student_frame,
    task_arguments,
)
from fopd_cli.runtime.memory.model import Models
from fopd_cli.runtime.memory.weights import Layout
from fopd_cli.runtime.placement import Plan, cuda_devices, with_overlaps
from fopd_cli.runtime.scheduling.lengths import keep_what_fits, rooms
from fopd_cli.runtime.scheduling.prompts import SPLITS, PromptStream, check_followed, context_tokens
from fopd_cli.runtime.weights import choice as transport
from fopd_cli.samples import TargetSpec
from fopd_cli.tasks import load_task


@dataclass
class LocalTeacher:
    """A teacher that runs here. `key` names it in findings."""

    key: str
    section: Teacher
    config: Any
    tokenizer: Any
    match: Match  # its tokenizer and the student's

    @cached_property
    def width(self) -> int:
        """Size of its hidden states."""
        return hf.hidden_width(self.config)


@dataclass
class Inputs:
    """Everything that a run reads, except weights."""

    recipe: Recipe
    plan: Plan
    student_config: Any
    tokenizer: Any
    teachers: list[LocalTeacher]
    stream: PromptStream
    layout: Layout

    @property
    def vocab(self) -> int:
        """Number of ids that all local models have; any beyond it are padding of one of them."""
        return min(hf.vocab_size(c) for c in (self.student_config, *(t.config for t in self.teachers)))

    @property
    def tables(self) -> tuple[np.ndarray | None, ...]:
        """Per teacher: student token id -> teacher token id; None where they are the same."""
        local = {t.section.name: t.match.table for t in self.teachers}
        return tuple(local.get(section.name) for section in self.recipe.teachers)

    @property
    def target_specs(self) -> tuple[TargetSpec, ...]:
        """One per teacher, remote ones included."""
        kind, local = self.recipe.targets, {t.section.name: t for t in self.teachers}
        specs = []
        for section, ranks in zip(self.recipe.teachers, self.plan.teachers, strict=True):
            width = section.k if kind == "topk" else 1
            if kind == "hidden":
                width = local[section.name].width
            dtype = resolve_dtype(section.dtype, bool(ranks[0].devices))
            specs.append(
                TargetSpec(
                    kind, width, dtype, self.stream.reexecutable and self.recipe.freshness.reexecute.share > 0
                )
            )
        return tuple(specs)

    @property
    def models(self) -> Models:
        """The shapes of the models that run here, and the length of the longest prompts."""
        response = max(self.recipe.sampler.max_new_tokens, self.recipe.eval.max_new_tokens or 0)
        asked, told = (
            context_tokens(self.recipe, self.stream, judged=judged) - response for judged in (False, True)
        )
        return placing.models(self.recipe, asked, told)

    @property
    def parameters(self) -> int:
        return elements(self.layout)

    @cached_property
    def adapters(self) -> Layout:
        """Layout of a LoRA student's adapters. Raises `UserError` if they do not fit the model."""
        model = hf.empty_model(self.student_config)
        add_adapters(model, self.recipe, torch.float32)
        dtype = sampler_dtype(self.recipe, self.plan)
        return [(name, tuple(tensor.shape), dtype) for name, tensor in lora.adapters(model)]

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return self.parameters if self.recipe.student.lora is None else elements(self.adapters)

    @property
    def published(self) -> Layout:
        """What samplers are sent after each step."""
        return self.layout if published_adapter(self.recipe) is None else self.adapters

    def setup(self, arena: torch.Tensor, folder: Path) -> Setup:
        """What workers get when they start. `arena`: the memory of teacher targets. `folder`: where their
        ranks meet.
        """
        rendezvous = folder.resolve() / f".rendezvous-{uuid.uuid4().hex[:8]}"
        return Setup(
            self.recipe,
            self.vocab,
            self.target_specs,
            self.tables,
            context_tokens(self.recipe, self.stream, judged=False),
            context_tokens(self.recipe, self.stream, judged=True),
            arena,
            transport.made(self.recipe, self.plan, self.published, rendezvous),
            rendezvous,
        )


def with_engines(recipe: Recipe) -> Recipe:
    """The recipe with every engine `auto` replaced by a concrete one; the choice is printed. Comes before
    anything else that a command does with a recipe.
    """
    recipe, chosen = auto.resolved(recipe, cuda_devices() > 0)
    if chosen is not None:
        print(chosen, file=sys.stderr, flush=True)
    return recipe


def load_inputs(recipe: Recipe, plan: Plan) -> Inputs:
    """Raises `UserError` for the first thing that cannot be read."""
    local = [t for t in recipe.teachers if not engine_of(t).remote]
    keys = {
        t.name: f"teacher {t.name!r}: model" if len(recipe.teachers) > 1 else "teacher.model" for t in local
    }
    check_model_name(recipe.student.model, "student.model")
    for t in local:
        check_model_name(t.model, keys[t.name])
    task = load_task(*task_arguments(recipe))
    config = hf.load_config(recipe.student.model, "student.model")
    support.check_architecture(config, "student.model")
    tokenizer = hf.load_tokenizer(recipe.student.model, "student.model")
    configs = {t.name: hf.load_config(t.model, keys[t.name]) for t in local}
    vocab = min(hf.vocab_size(c) for c in (config, *configs.values()))
    teachers = []
    for t in local:
        if teacher_facts(t).our_forward:
            support.check_architecture(configs[t.name], keys[t.name])
        theirs = hf.load_tokenizer(t.model, keys[t.name])
        teachers.append(
            LocalTeacher(keys[t.name], t, configs[t.name], theirs, match(tokenizer, theirs, vocab))
        )
    frames = {t.section.name: own_frame(t, recipe) for t in teachers if t.section.template == "teacher"}
    check_variables(recipe.template_kwargs, [tokenizer, *(f.tokenizer for f in frames.values())])
    stream = PromptStream(
        task,
        student_frame(recipe, tokenizer),
        recipe.seed,
        recipe.sampler.samples_per_prompt,
        recipe.teachers,
        frames,
    )
    for split in SPLITS:
        if not stream.prompts[split]:
            raise UserError(f"task: there is no {split} prompt; give it at least one")
    if (
        recipe.template_kwargs
        and not frames
        and not any(p.messages for s in SPLITS for p in stream.prompts[s])
    ):
        raise UserError(
            "task.chat_template_kwargs: all prompts are plain text, so no chat template is rendered; "
            "leave it out"
        )
    if frames and stream.reexecutable:
        raise UserError(
            "teacher.template: what stands between turns is in the student's frame, so a teacher with its "
            "own can judge tasks of one turn only; set teacher.template: student"
        )
    found = {t.section.name: (t.key, t.config) for t in teachers}
    stream.notices += keep_what_fits(recipe, stream, rooms(recipe, config, found, _served(recipe)))
    check_followed(recipe, stream)
    layout = hf.weight_layout(config, sampler_dtype(recipe, plan))
    inputs = Inputs(recipe, plan, config, tokenizer, teachers, stream, layout)
    if plan.exclusive and (count := cuda_devices()):  # how long prompts are is known only now
        inputs.plan = with_overlaps(recipe, plan, placing.fit(recipe, count, inputs.models))
    return inputs


def own_frame(teacher: LocalTeacher, recipe: Recipe) -> Frame:
    table = teacher.match.table
    return Frame(
        teacher.tokenizer,
        recipe.template_kwargs,
        "teacher",
        getattr(recipe.task, "system", None),
        None if table is None else inverse(table),
    )


def _served(recipe: Recipe) -> dict[str, int]:
    """The context length of each remote teacher that reports it."""
    found = {}
    for section in recipe.teachers:
        if engine_of(section).remote:
            with contextlib.closing(engine_of(section).build.remote(section, 0)) as server:
                found[section.name] = server.context()
    return {name: context for name, context in found.items() if context is not None}


def check_model_name(model: str, key: str) -> None:
    """Raises `UserError` unless the name is a directory or looks like a hub id."""
    if paths.is_dir(model):
        return
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.count("/") == 0:
        raise UserError(
            f"{key}: there is no directory {model!r}{paths.similar(model)}; give a Hugging Face model "
            "directory or a hub id (owner/name)"
        )


def elements(layout: Layout) -> int:
    """Number of elements in a layout."""
    return sum(int(np.prod(shape)) for _, shape, _ in layout)
