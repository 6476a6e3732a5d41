"""What would go wrong, found before the devices are paid for. `fopd doctor` prints it; `fopd run` refuses on errors.

FIELD experience behind the checks: tokenizers that differ train on garbage without a word; a base student under an
instruct teacher never meets its end-of-sequence token; Docker's 64 MB of shared memory ends a run at its first batch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fopd_cli.engines import hf, lora, vllm_engine
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, Teacher, Vllm
from fopd_cli.runtime.build import (
    add_adapters,
    http_server,
    published_adapter,
    resolve_dtype,
    sampler_dtype,
    task_arguments,
)
from fopd_cli.runtime.placement import Plan
from fopd_cli.runtime.publish import Layout, layout_bytes
from fopd_cli.runtime.sizes import arena_bytes, available_memory, free_shared_memory
from fopd_cli.runtime.stream import PromptStream
from fopd_cli.samples import TargetSpec
from fopd_cli.tasks import load_task

GB = 1e9
SANITY_LIMIT_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Finding:
    """What is wrong, and what to do about it. An error stops a run; a warning is for the user to judge."""

    level: Literal["error", "warning"]
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.level}: {self.what}; {self.cure}"


@dataclass
class LocalTeacher:
    """A teacher that runs here. `key` names it in findings."""

    key: str
    section: Teacher
    config: Any
    tokenizer: Any


@dataclass
class Inputs:
    """Everything that a run reads, loaded but for the weights."""

    recipe: Recipe
    plan: Plan
    student_config: Any
    tokenizer: Any
    teachers: list[LocalTeacher]
    stream: PromptStream
    layout: Layout

    @property
    def vocab(self) -> int:
        """Ids that all models here have; the rest is padding of one of them."""
        return min(hf.vocab_size(c) for c in (self.student_config, *(t.config for t in self.teachers)))

    @property
    def target_specs(self) -> tuple[TargetSpec, ...]:
        """Of each teacher, remote ones included."""
        kind, local = self.recipe.targets, {t.section.name: t for t in self.teachers}
        specs = []
        for section, ranks in zip(self.recipe.teachers, self.plan.teachers, strict=True):
            width = section.k if kind == "topk" else 1
            if kind == "hidden":
                width = hf.text_config(local[section.name].config).hidden_size
            dtype = resolve_dtype(section.dtype, bool(ranks[0].devices))
            specs.append(
                TargetSpec(kind, width, dtype, self.stream.replayable and self.recipe.freshness.replay.share > 0)
            )
        return tuple(specs)

    @property
    def parameters(self) -> int:
        return _count(self.layout)

    @cached_property
    def adapters(self) -> Layout:
        """Of a LoRA student. Raises `UserError` if they do not fit the model."""
        model = hf.empty_model(self.student_config)
        add_adapters(model, self.recipe, torch.float32)
        dtype = sampler_dtype(self.recipe, self.plan)
        return [(name, tuple(tensor.shape), dtype) for name, tensor in lora.adapters(model)]

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return self.parameters if self.recipe.student.lora is None else _count(self.adapters)

    @property
    def published(self) -> Layout:
        """What samplers are sent after each step."""
        return self.layout if published_adapter(self.recipe) is None else self.adapters

    @property
    def learner_bytes(self) -> int:
        """Weights, gradients and optimizer states of all learner ranks together."""
        learner = self.recipe.learner
        moments = 2 * hf.DTYPES[learner.optimizer_dtype].itemsize
        frozen = 0
        if self.recipe.student.lora is not None:
            frozen = self.parameters * resolve_dtype(learner.dtype, bool(self.plan.learners[0].devices)).itemsize
        return (4 + 4 + moments) * self.trainable + frozen  # fp32 masters, gradients, two moments


def load_inputs(recipe: Recipe, plan: Plan) -> Inputs:
    """Raises `UserError` for the first thing that cannot be read."""
    local = [t for t in recipe.teachers if t.engine != "http"]
    keys = {t.name: f"teacher {t.name!r}: model" if len(recipe.teachers) > 1 else "teacher.model" for t in local}
    check_model_name(recipe.student.model, "student.model")
    for t in local:
        check_model_name(t.model, keys[t.name])
    task = load_task(*task_arguments(recipe))
    config = hf.load_config(recipe.student.model, "student.model")
    teachers = [
        LocalTeacher(keys[t.name], t, hf.load_config(t.model, keys[t.name]), hf.load_tokenizer(t.model, keys[t.name]))
        for t in local
    ]
    tokenizer = hf.load_tokenizer(recipe.student.model, "student.model")
    stream = PromptStream(task, tokenizer, recipe.seed, recipe.sampler.samples_per_prompt, recipe.teachers)
    for split in ("train", "eval"):
        if not stream.prompts[split]:
            raise UserError(f"task: there is no {split} prompt; give it at least one")
    layout = hf.weight_layout(config, sampler_dtype(recipe, plan))
    return Inputs(recipe, plan, config, tokenizer, teachers, stream, layout)


def check_model_name(model: str, key: str) -> None:
    """A name that is no directory must at least look like a hub id."""
    if Path(model).is_dir():
        return
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.count("/") == 0:
        raise UserError(
            f"{key}: there is no directory {model!r}; give a Hugging Face model directory or a hub id (owner/name)"
        )


def findings(inputs: Inputs, disk: Path) -> Iterator[Finding]:
    """All that can be found without loading weights; `disk` is where the run will write."""
    yield from _vllm(inputs)
    yield from _compiler(inputs)
    for teacher in inputs.teachers:
        yield from _tokenizers(inputs, teacher)
        yield from _ends(inputs, teacher)
        yield from _templates(inputs, teacher)
        yield from _sameness(inputs, teacher)
    yield from _models(inputs)
    yield from _vocabulary(inputs)
    yield from _servers(inputs)
    yield from _lengths(inputs)
    yield from _disk(inputs, disk)
    yield from _memory(inputs)


def _models(inputs: Inputs) -> Iterator[Finding]:
    """Whether each model's files are all of it and nothing else, and its logits something that the losses know."""
    models = [("student.model", inputs.recipe.student.model, inputs.student_config, True)]
    models += [(t.key, t.section.model, t.config, t.section.engine == "transformers") for t in inputs.teachers]
    for key, model, config, ours in models:
        if ours:  # vLLM applies what it finds by itself, and gives log-probs
            try:
                hf.head_rule(config, key)
            except UserError as error:
                yield Finding("error", str(error), "choose another model")
        report = hf.load_report(model, config, key)
        if report is not None:
            where = f"{key}: {model!r}"
            yield from (Finding("error", *found) for found in report.errors(where))
            yield from (Finding("warning", *found) for found in report.warnings(where))


def _vocabulary(inputs: Inputs) -> Iterator[Finding]:
    """Ids that not all models have are never sampled; whoever uses them otherwise must know."""
    vocab = inputs.vocab
    ends = hf.token_rules(inputs.recipe.student.model, inputs.tokenizer, inputs.student_config, "student.model").eos
    if min(ends) >= vocab:
        yield Finding(
            "error", f"the student ends a response with token {sorted(ends)}, but the models share only the ids below {vocab}: "
            "none would ever end", "choose a teacher that has the token",
        )  # fmt: skip
    for split in ("train", "eval"):
        for index in range(len(inputs.stream.prompts[split])):
            largest = inputs.stream.largest_id(split, index)
            if largest >= vocab:
                yield Finding(
                    "error", f"task: {split} prompt {index} holds token {largest}, but the models share only the ids below {vocab}",
                    "leave the token out of the prompt or its chat template, or choose a pair that has it",
                )  # fmt: skip
                break
    own = [i for i in inputs.tokenizer.get_vocab().values() if i >= vocab]
    if own:
        yield Finding(
            "warning", f"the student's tokenizer knows {len(own)} tokens (ids from {min(own)} on) past the {vocab} ids that the models "
            "share; they are never sampled", "make sure that the output of tools never holds them",
        )  # fmt: skip


def _vllm(inputs: Inputs) -> Iterator[Finding]:
    """Whether vLLM is there, in the tested version, and can split the models as asked."""
    engines: list[tuple[str, str, Vllm, Any]]
    engines = [("sampler", inputs.recipe.sampler.engine, inputs.recipe.sampler.vllm, inputs.student_config)]
    engines += [(t.key.removesuffix(".model"), t.section.engine, t.section.vllm, t.config) for t in inputs.teachers]
    wanted = [e for e in engines if e[1] == "vllm"]
    problem = vllm_engine.problem() if wanted else None
    if problem is not None:
        what, _, cure = problem.partition(": ")
        yield Finding("error", f"{wanted[0][0]}.engine: {what}", cure)
    for key, _, section, config in wanted:
        heads = hf.text_config(config).num_attention_heads
        if heads % section.tensor_parallel:
            yield Finding(
                "error", f"{key}.vllm.tensor_parallel: {section.tensor_parallel} does not divide the model's {heads} attention heads",
                f"set it to a divisor of {heads}",
            )  # fmt: skip


def _compiler(inputs: Inputs) -> Iterator[Finding]:
    """torch.compile writes C++ on a CPU (and Triton, which comes with PyTorch, on CUDA)."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if (
        inputs.recipe.learner.compile
        and not inputs.plan.learners[0].devices
        and not any(map(shutil.which, filter(None, compilers)))
    ):
        yield Finding(
            "error", "learner.compile: there is no C++ compiler on this machine",
            "install g++, set CXX, or set learner.compile: false",
        )  # fmt: skip


def _servers(inputs: Inputs) -> Iterator[Finding]:
    """Ask every remote teacher whether it is there, knows our tokens and gives prompt log-probs."""
    remote = [t for t in inputs.recipe.teachers if t.engine == "http"]
    if remote:
        from fopd_cli.engines.http_teacher import HttpTeacher

        probe = hf.encode_prompt(inputs.tokenizer, inputs.stream.prompts["train"][0])
        for section in remote:
            HttpTeacher(http_server(section), inputs.vocab).check(inputs.tokenizer, probe, section.k)
    yield from ()


def _tokenizers(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    ours, theirs = inputs.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    ours_by_id, theirs_by_id = {i: t for t, i in ours.items()}, {i: t for t, i in theirs.items()}
    shared = set(ours_by_id) & set(theirs_by_id)
    different = sorted(i for i in shared if ours_by_id[i] != theirs_by_id[i])
    if different:
        i = different[0]
        yield Finding(
            "error",
            f"student and teacher have different tokenizers: {len(different)} of {len(shared)} shared ids differ, first "
            f"{i}: {ours_by_id[i]!r} against {theirs_by_id[i]!r}",
            "choose a pair of one model family (distillation compares the two token by token)",
        )
        return
    beyond = [i for i in (set(ours_by_id) ^ set(theirs_by_id)) if i < inputs.vocab]
    if beyond:
        yield Finding(
            "warning",
            f"{len(beyond)} token ids under {inputs.vocab} are known to only one of the two tokenizers",
            "make sure that the prompts and answers never use them",
        )


def _ends(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    recipe = inputs.recipe
    ours = hf.token_rules(recipe.student.model, inputs.tokenizer, inputs.student_config, "student.model").eos
    theirs = hf.token_rules(teacher.section.model, teacher.tokenizer, teacher.config, teacher.key).eos
    if ours == theirs:
        return
    yield Finding(
        "warning" if ours & theirs else "error",
        f"the student ends a response with token {sorted(ours)}, the teacher with {sorted(theirs)}: the student would be "
        "taught to end with a token that does not stop it",
        "put the teacher's eos_token_id into the student's generation_config.json (a list may hold both)",
    )


def _templates(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    ours, theirs = (getattr(t, "chat_template", None) for t in (inputs.tokenizer, teacher.tokenizer))
    if any(p.messages for p in inputs.stream.prompts["train"][:1]) and ours != theirs:
        yield Finding(
            "warning",
            "student and teacher have different chat templates; the student's is used for both",
            "make sure that the teacher understands it, or give the student the teacher's chat_template",
        )


def _lengths(inputs: Inputs) -> Iterator[Finding]:
    r = inputs.recipe
    # vLLM generates one token after what it scores.
    models = [("student.model", inputs.student_config, 0)]
    models += [(t.key, t.config, int(t.section.engine == "vllm")) for t in inputs.teachers]
    for key, config, extra in models:
        context = getattr(hf.text_config(config), "max_position_embeddings", None)
        for split, new in (
            ("train", r.sampler.max_new_tokens), ("eval", r.eval.max_new_tokens or r.sampler.max_new_tokens),
        ):  # fmt: skip
            longest, index = inputs.stream.longest(split)
            if context is not None and longest + new + extra > context:
                yield Finding(
                    "error",
                    f"{key}: {split} prompt {index} has {longest} tokens, with {new} new ones that is more than the "
                    f"model's context of {context}",
                    "lower max_new_tokens, leave the prompt out, or take a model with a longer context",
                )


def _sameness(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    if inputs.recipe.student.model == teacher.section.model:
        yield Finding("warning", "student and teacher are the same model: every loss is 0", "name a larger teacher")


def _disk(inputs: Inputs, folder: Path) -> Iterator[Finding]:
    while not folder.exists():
        folder = folder.parent
    # fp32 masters and two AdamW moments, kept `keep` times and once more while a new one is written; the export.
    state = 12 * inputs.trainable
    needed = 1.2 * (state * (inputs.recipe.checkpoint.keep + 1) + 4 * inputs.parameters)
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield Finding(
            "error", f"{folder} has {free / GB:.2f} GB free, checkpoints need about {needed / GB:.2f} GB",
            "free some, choose another --run-dir, or lower checkpoint.keep",
        )  # fmt: skip


def _memory(inputs: Inputs) -> Iterator[Finding]:
    recipe, plan = inputs.recipe, inputs.plan
    sampler_bytes = layout_bytes(inputs.layout)
    shared = arena_bytes(recipe, inputs.target_specs) + 2 * layout_bytes(inputs.published)
    if shared > free_shared_memory():
        yield Finding(
            "error", f"shared memory: {shared / GB:.2f} GB are needed, /dev/shm has {free_shared_memory() / GB:.2f} GB free",
            "in Docker add --ipc=host (or --shm-size); else lower learner.batch_samples or sampler.max_new_tokens",
        )  # fmt: skip
    ranks = {t.name: r for t, r in zip(recipe.teachers, plan.teachers, strict=True)}
    teachers = []
    for t in inputs.teachers:
        dtype = resolve_dtype(t.section.dtype, bool(ranks[t.section.name][0].devices))
        teachers.append((t, ranks[t.section.name], layout_bytes(hf.weight_layout(t.config, dtype))))
    learner = inputs.learner_bytes
    if not plan.learners[0].devices:
        needed = learner + sum(size * len(r) for _, r, size in teachers) + sampler_bytes * len(plan.samplers)
        if needed + shared > available_memory():
            yield Finding(
                "error", f"the models need about {(needed + shared) / GB:.1f} GB of RAM, {available_memory() / GB:.1f} GB are free",
                "use smaller models, or a machine with more memory",
            )  # fmt: skip
        return
    if recipe.learner.offload and learner > available_memory():
        yield Finding(
            "error", f"learner.offload: weights and optimizer need {learner / GB:.1f} GB of RAM, {available_memory() / GB:.1f} GB are free",
            "use a smaller model, student.lora, or more devices instead of offloading",
        )  # fmt: skip
    groups = [
        (plan.learners, 0 if recipe.learner.offload else learner / len(plan.learners)),
        (plan.samplers, sampler_bytes / len(plan.samplers[0].devices)),
    ]
    for t, workers, total in teachers:  # transformers: sharded over its ranks; vllm: every rank holds all of it
        groups.append((workers, total / len(workers if t.section.engine == "transformers" else workers[0].devices)))
    for workers, need in groups:
        for worker in workers:
            yield from _device_memory(f"{worker.name} on cuda:{worker.devices[0]}", worker.devices[0], need)


def _device_memory(who: str, device: int, need: float) -> Iterator[Finding]:
    free = device_memory(device)
    if free is not None and need > free:
        yield Finding(
            "error", f"{who} needs {need / GB:.1f} GB for weights and optimizer alone, the device has {free / GB:.1f} GB",
            "give that role more devices (placement) or use a smaller model",
        )  # fmt: skip


def device_memory(device: int) -> float | None:
    """Total bytes of a CUDA device, asked of nvidia-smi so that this process gets no CUDA context; None if unknown."""
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return float(out.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def sanity(inputs: Inputs) -> Finding | None:
    """Student = teacher must give loss 0 and drift 0: sample a little, let the student judge itself, look at both.

    Loads the student on the CPU, through the very engines of a run. What is left is this machine's noise floor.
    """
    from fopd_cli.engines.fsdp_learner import FsdpLearner
    from fopd_cli.engines.transformers_teacher import TransformersTeacher
    from fopd_cli.runtime.build import learner_config, transformers_sampler
    from fopd_cli.samples import Request, Rollout, Sample, SampleId, SamplingParams, TeacherTargets

    recipe, dtype, cpu = inputs.recipe, torch.float32, torch.device("cpu")
    path = recipe.student.model
    sampler = transformers_sampler(path, dtype, cpu, concurrency=4)
    params = SamplingParams(recipe.sampler.temperature, 1.0, min(32, recipe.sampler.max_new_tokens))
    count = min(4, len(inputs.stream.prompts["train"]))
    sampler.submit(
        [
            Request(i, inputs.stream.encoded("train", i), SampleId("train", 0, i, 0).seed(0), params)
            for i in range(count)
        ]
    )
    rollouts: list[Rollout] = []
    while sampler.busy:
        rollouts += sampler.step()
    width = hf.text_config(inputs.student_config).hidden_size
    targets = [TeacherTargets("hidden", hidden=torch.empty(r.response_length, width, dtype=dtype)) for r in rollouts]
    vocab, longest = hf.vocab_size(inputs.student_config), max(len(r.token_ids) for r in rollouts)
    judge = TransformersTeacher(
        hf.load_model(path, "student.model", dtype), cpu, 1, 4096, vocab, longest, recipe.learner.packing
    )
    judge.score(rollouts, targets)
    config = learner_config(recipe, torch.float32, vocab, longest, support="full", drift="sampled", compile=False)
    config = replace(config, offload=False, compile=False)
    heads = [hf.load_head(path, "student.model", dtype)]
    learner = FsdpLearner(hf.load_model(path, "student.model", dtype), heads, config, cpu, 0, 1)
    stats = learner.measure([Sample(r, t, lag=0) for r, t in zip(rollouts, targets, strict=True)])
    loss, drift = float(np.abs(stats.kl).max()), float(np.abs(stats.drift_roll).max())
    limit = SANITY_LIMIT_NATS[dtype]
    if loss < limit and drift < limit:
        return None
    return Finding(
        "error", f"the student judged by itself has loss {loss:.2e} and drift {drift:.2e} nats, which should be 0 (limit {limit})",
        "the sampler, teacher and learner disagree about this model; please report it with the model's name",
    )  # fmt: skip


def _count(layout: Layout) -> int:
    """Numbers in it."""
    return sum(int(np.prod(shape)) for _, shape, _ in layout)
