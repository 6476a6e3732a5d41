"""Problems found before the devices are paid for. `fopd doctor` prints them; `fopd run` refuses to start on
errors.

Field experience behind the checks: with different tokenizers a run silently trains on garbage; a base student
under an instruct teacher never sees its end-of-sequence token; Docker's 64 MB of shared memory end a run at
its first batch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fopd_cli import paths
from fopd_cli.engines.building import TooLong
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.registry import engine_of, sampler_facts, teacher_facts
from fopd_cli.engines.text.templates import Frame, encode_observation, end_of_turn, readable
from fopd_cli.engines.text.vocabularies import exchanged, inverse, listed
from fopd_cli.engines.tokens import rope
from fopd_cli.errors import UserError
from fopd_cli.inputs import Inputs, LocalTeacher, elements, own_frame
from fopd_cli.outlook import outlook
from fopd_cli.recipe import PluginTask, Recipe, Sampler, Teacher
from fopd_cli.runtime import devices
from fopd_cli.runtime.build import resolve_dtype
from fopd_cli.runtime.journal import trackers
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.memory.sizes import arena_bytes, available_memory, free_shared_memory
from fopd_cli.runtime.placement import SPARE
from fopd_cli.runtime.scheduling.lengths import tells
from fopd_cli.runtime.scheduling.prompts import SPLITS, context_tokens
from fopd_cli.runtime.weights.choice import host_bytes, misfit
from fopd_cli.samples import Prompt

GB = 1e9
DEVICE_CURE = (
    "give that role more devices (placement), lower learner.micro_tokens or sampler.max_new_tokens, set "
    "learner.activation_checkpointing: true, or use a smaller model"
)
RAM_CURE = "use smaller models, fewer processes (placement), or a machine with more memory"
COPY_CURE = "set checkpoint.asynchronous: false, or "
PROMPTS_LOOKED_AT = 64
SANITY_LIMIT_NATS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Finding:
    """What is wrong, and what to do about it. An error stops a run; a warning is for the user to judge; a
    note is for information.
    """

    level: Literal["error", "warning", "note"]
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level}: {self.what}" + (f"; {self.cure}" if self.cure else "")


def findings(inputs: Inputs, disk: Path) -> Iterator[Finding]:
    """All findings that need no weights, each once; `disk` is where the run will write."""
    yield from dict.fromkeys(_findings(inputs, disk))


def _findings(inputs: Inputs, disk: Path) -> Iterator[Finding]:
    yield from (Finding("note", notice) for notice in inputs.stream.notices)
    yield from _visible()
    yield from _engines(inputs)
    yield from _packing(inputs)
    yield from _rope(inputs)
    yield from _compiler(inputs)
    yield from _trackers(inputs.recipe)
    yield from _ends_of_turns(inputs)
    for teacher in inputs.teachers:
        yield from _tokenizers(inputs, teacher)
        yield from _ends(inputs, teacher)
        yield from _templates(inputs, teacher)
        yield from _sameness(inputs, teacher)
        yield from _sizes(inputs, teacher)
    yield from _plain_text(inputs)
    yield from _amounts(inputs)
    yield from _conversation(inputs)
    yield from of_models(inputs)
    yield from _vocabulary(inputs)
    yield from _servers(inputs)
    yield from _temperatures(inputs.recipe)
    yield from _lag(inputs.recipe)
    yield from _disk(inputs, disk)
    yield from _transport(inputs)
    yield from _memory(inputs)


def of_pairs(inputs: Inputs) -> Iterator[Finding]:
    """Whether the teachers know the student's tokens at all; without that, no figure about them means
    anything.
    """
    for teacher in inputs.teachers:
        yield from _tokenizers(inputs, teacher)
    yield from _servers(inputs)


def of_models(inputs: Inputs) -> Iterator[Finding]:
    """Whether each model's files are complete and contain nothing else."""
    models = [("student.model", inputs.recipe.student.model, inputs.student_config)]
    models += [(t.key, t.section.model, t.config) for t in inputs.teachers]
    for key, model, config in models:
        if support.quantized(config) is not None:  # a teacher on vLLM, which reads its files itself
            continue
        try:
            report = hf.load_report(model, config, key)
        except UserError as error:
            yield Finding("error", str(error), "get the whole checkpoint")
            continue
        if report is not None:
            where = f"{key}: {model!r}"
            yield from (Finding("error", *found) for found in report.errors(where))
            yield from (Finding("warning", *found) for found in report.warnings(where))


def _vocabulary(inputs: Inputs) -> Iterator[Finding]:
    """Ids that some model lacks are never sampled; prompts and tools must not use them either."""
    vocab = inputs.vocab
    ends = _student_ends(inputs)
    if min(ends) >= vocab:
        yield Finding(
            "error",
            f"the student ends a response with token {sorted(ends)}, but the models share only the ids below "
            f"{vocab}: none would ever end",
            "choose a teacher that has the token",
        )
    stream = inputs.stream
    for split in SPLITS:
        for index in stream.kept[split]:
            largest = stream.largest_id(split, index)
            if largest >= vocab:
                yield Finding(
                    "error",
                    f"task: {stream.prompts[split][index].where} holds token {largest}, but the models "
                    f"share only the ids below {vocab}",
                    "leave the token out of the prompt or its chat template, or choose a pair that has it",
                )
                break
    own = [i for i in inputs.tokenizer.get_vocab().values() if i >= vocab]
    if own:
        yield Finding(
            "warning",
            f"the student's tokenizer knows {len(own)} tokens (ids from {min(own)} on) past the {vocab} ids "
            "that the models share; they are never sampled",
            "make sure that the output of tools never holds them",
        )


def _visible() -> Iterator[Finding]:
    """Requested devices that CUDA does not find would otherwise be left out silently."""
    if lost := devices.unusable():
        yield Finding(
            "warning",
            f"{devices.VISIBLE}: CUDA finds {devices.count()} devices and none for {', '.join(lost)}",
            "name devices that nvidia-smi -L shows",
        )


def _engines(inputs: Inputs) -> Iterator[Finding]:
    """Whether each engine is installed and accepts its model with these settings."""
    uses: list[tuple[str, Sampler | Teacher, Any]]
    uses = [("sampler", inputs.recipe.sampler, inputs.student_config)]
    uses += [(t.key.removesuffix(".model"), t.section, t.config) for t in inputs.teachers]
    seen = set()
    for key, section, config in uses:
        engine = engine_of(section)
        if engine.name not in seen and (problem := engine.build.missing()) is not None:
            what, _, cure = problem.partition(": ")
            yield Finding("error", f"{key}.engine: {what}", cure)
        seen.add(engine.name)
        yield from (Finding("error", *found) for found in engine.build.refusals(key, section, config))


def _packing(inputs: Inputs) -> Iterator[Finding]:
    """Whether samples can share a row, as far as the architecture tells; the engines then try it."""
    models = [("learner.packing", inputs.recipe.learner.packing, inputs.student_config)]
    models += [
        (f"{t.key.removesuffix('.model')}.packing", t.section.packing, t.config)
        for t in inputs.teachers
        if teacher_facts(t.section).our_forward
    ]
    for key, wanted, config in models:
        if wanted and (refused := support.packing_refusal(config)) is not None:
            yield Finding("error", f"{key}: {config.model_type} {refused}", f"set {key}: false")


def _rope(inputs: Inputs) -> Iterator[Finding]:
    """Samples that grow past the length at which the student's rotary embedding switches factors."""
    recipe = inputs.recipe
    switch = rope.switch(inputs.student_config)
    if switch is None or sampler_facts(recipe.sampler).one_rotation:  # the learner then uses one, too
        return
    stream = inputs.stream
    shortest = min(len(stream.encoded("train", i)) for i in stream.kept["train"][:PROMPTS_LOOKED_AT])
    longest = stream.longest("train", judged=False)
    if shortest < switch < longest + recipe.sampler.max_new_tokens:
        yield Finding(
            "warning",
            f"student.model: its rotary embedding has other factors past {switch} tokens, and responses "
            "can grow past them; what "
            "they began with is sampled with one kind and trained with the other, which counts as drift",
            f"keep prompt and response within {switch} tokens (sampler.max_new_tokens), or sample with "
            "vLLM, which keeps to one kind",
        )


def _compiler(inputs: Inputs) -> Iterator[Finding]:
    """torch.compile writes C++ on a CPU (and Triton, which comes with PyTorch, on CUDA)."""
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if (
        inputs.recipe.learner.compile
        and not inputs.plan.learners[0].devices
        and not any(map(shutil.which, filter(None, compilers)))
    ):
        yield Finding(
            "error",
            "learner.compile: there is no C++ compiler on this machine",
            "install g++, set CXX, or set learner.compile: false",
        )


def _trackers(recipe: Recipe) -> Iterator[Finding]:
    for name in trackers.missing(recipe.track):
        yield Finding(
            "error", f"track: the {name} package is not installed", f"pip install {name}, or leave it out"
        )


def _servers(inputs: Inputs) -> Iterator[Finding]:
    """Check that every remote teacher answers, knows our tokens and gives prompt log-probs, even of the
    longest sample.
    """
    remote = [t for t in inputs.recipe.teachers if engine_of(t).remote]
    if remote:
        stream = inputs.stream
        split, index = max(
            ((s, i) for s in SPLITS for i in stream.kept[s]), key=lambda at: stream.tokens(at[0], at[1], True)
        )
        probe = np.resize(stream.encoded(split, index), context_tokens(inputs.recipe, stream, judged=True))
        for section in remote:
            try:
                with contextlib.closing(engine_of(section).build.remote(section, inputs.vocab)) as server:
                    server.check(inputs.tokenizer, probe, section.k)
            except TooLong as error:
                where = stream.prompts[split][index].where
                raise UserError(f"{error}; the longest sample that there can be is of {where}") from None
    yield from ()


def _tokenizers(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    found = teacher.match
    if found.different:
        yield Finding(
            "error",
            f"student and teacher have different tokenizers: {len(found.different)} of {found.shared} shared "
            f"ids differ, first {found.different[0]}",
            "choose a pair of one model family (distillation compares the two token by token)",
        )
        return
    if found.renamed:
        yield Finding(
            "warning",
            f"student and {teacher.section.name} differ in {len(found.renamed)} special tokens; the "
            f"student's are taken for the teacher's: {listed(found.renamed)}",
            "make sure that they mean the same, or choose a pair with one tokenizer",
        )
    if found.beyond:
        yield Finding(
            "warning",
            f"{found.beyond} token ids under {inputs.vocab} are known to only one of the two tokenizers",
            "make sure that the prompts and answers never use them",
        )


def _student_ends(inputs: Inputs) -> frozenset[int]:
    return hf.token_rules(
        inputs.recipe.student.model, inputs.tokenizer, inputs.student_config, "student.model"
    ).eos


def _ends(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    ours = _student_ends(inputs)
    theirs = hf.token_rules(teacher.section.model, teacher.tokenizer, teacher.config, teacher.key).eos
    if (table := teacher.match.table) is not None:
        back = inverse(table)
        theirs = frozenset(int(back[i]) if i < len(back) else i for i in theirs)
    if ours == theirs:
        return
    yield Finding(
        "warning" if ours & theirs else "error",
        f"the student ends a response with token {sorted(ours)}, the teacher with {sorted(theirs)}: the "
        "student would be taught to end with a token that does not stop it",
        "put the teacher's eos_token_id into the student's generation_config.json (a list may hold both)",
    )


def _ends_of_turns(inputs: Inputs) -> Iterator[Finding]:
    """A chat template ends the assistant's turn with its own token, which must also end a response."""
    ours, frames = _student_ends(inputs), list[Frame]()
    if any(p.messages for p in inputs.stream.prompts["train"][:1]):
        frames.append(inputs.stream.frame)
    frames += [own_frame(t, inputs.recipe) for t in inputs.teachers if t.section.template == "teacher"]
    for frame in frames:
        end = end_of_turn(frame.tokenizer, frame.variables)
        known = (
            end
            if end is None or frame.to_student is None
            else int(exchanged(np.array([end]), frame.to_student)[0])
        )
        if known is not None and known not in ours:
            yield Finding(
                "warning",
                f"the {frame.whose}'s chat template ends the assistant's turn with "
                f"{frame.tokenizer.convert_ids_to_tokens(end)!r} ({known}), but the student ends a response "
                f"with {sorted(ours)}: its responses may all be cut off at max_new_tokens",
                f"put {known} into eos_token_id of the student's generation_config.json (a list may hold "
                "several)",
            )


def _templates(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    if (
        not any(p.messages for p in inputs.stream.prompts["train"][:1])
        or teacher.section.template == "teacher"
    ):
        return
    ours, theirs = (getattr(t, "chat_template", None) for t in (inputs.tokenizer, teacher.tokenizer))
    if ours != theirs:
        yield Finding(
            "warning",
            "student and teacher have different chat templates; the student's is used for both",
            "make sure that the teacher understands it, or set teacher.template: teacher",
        )


def _conversation(inputs: Inputs) -> Iterator[Finding]:
    """The chat template must have a place for the environment's answers."""
    first = inputs.stream.prompts["train"][inputs.stream.kept["train"][0]]
    if inputs.stream.episodic and first.messages:
        try:
            _between(inputs, first)
        except UserError as error:
            what, _, cure = str(error).partition("; ")
            yield Finding("error", what, cure)


def _between(inputs: Inputs, prompt: Prompt) -> np.ndarray:
    role = "tool" if prompt.tools else "user"
    return encode_observation(inputs.tokenizer, "...", role, True, None, inputs.recipe.template_kwargs)


def shown(inputs: Inputs) -> Iterator[str]:
    """One prompt as the student and its teacher see it, with special tokens in double brackets: most runs
    that go wrong do so here.
    """
    stream = inputs.stream
    index = stream.kept["train"][0]
    prompt = stream.prompts["train"][index]
    yield from _block(
        f"what the student reads ({prompt.where})", inputs.tokenizer, stream.encoded("train", index)
    )
    if stream.episodic and prompt.messages:
        yield from _block("what stands between its turns", inputs.tokenizer, _between(inputs, prompt))
    told = stream.as_told("train", index)
    if told is None:
        yield "the teacher reads the same"
        return
    name = stream.teacher_name("train", index)
    teacher = next((t for t in inputs.teachers if t.section.name == name), None)
    if teacher is not None and teacher.section.template == "teacher":
        table = teacher.match.table
        yield from _block(
            "what the teacher reads", teacher.tokenizer, told if table is None else exchanged(told, table)
        )
    else:
        yield from _block("what the teacher reads", inputs.tokenizer, told)


def _block(title: str, tokenizer: Any, ids: np.ndarray) -> Iterator[str]:
    yield f"{title}, {len(ids)} tokens:"
    yield from (f"    {line}" for line in readable(tokenizer, ids).split("\n"))


def _temperatures(recipe: Recipe) -> Iterator[Finding]:
    """At a temperature other than 1, each support converges to a different student; the user must choose
    which.
    """
    t, support = recipe.sampler.temperature, recipe.support
    if t == 1 or support == "full" or recipe.loss.teacher_temperature == "sampler":
        return
    if support == "topk":
        yield Finding(
            "warning",
            f"sampler.temperature: {t:g}: the student learns from contexts that it sampled at {t:g}, while "
            "loss.support topk compares both models at temperature 1, so that it settles where the student "
            "is the teacher at temperature 1",
            "evaluate at the temperature that you will use (eval.temperature), or set sampler.temperature: 1",
        )
        return
    yield Finding(
        "warning",
        f"sampler.temperature: {t:g}: loss.support {support} compares the student at {t:g} with the teacher "
        f"at 1, so that it settles where the student, sampled at {t:g}, is the teacher; at temperature 1 it "
        f"is then the teacher to the power of {t:g}",
        "set loss.teacher_temperature: sampler (needs hidden states) or sampler.temperature: 1, unless "
        "you want that",
    )


def _lag(recipe: Recipe) -> Iterator[Finding]:
    expected = outlook(recipe)
    if expected is not None and not expected.safe:
        key = "max_lag" if recipe.schedule.lag is None else "lag"
        yield Finding(
            "warning",
            f"schedule.{key}: {expected}; the faster the student moves, the worse",
            "set freshness.policy: fopd with its anchor, loss.support: full or topk, or a shorter lag",
        )


def _sameness(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    # With extra context, a model can teach itself.
    if inputs.recipe.student.model == teacher.section.model and not tells(teacher.section):
        yield Finding(
            "warning", "student and teacher are the same model: every loss is 0", "name a larger teacher"
        )


def _sizes(inputs: Inputs, teacher: LocalTeacher) -> Iterator[Finding]:
    theirs = elements(hf.weight_layout(teacher.config, torch.float32))
    if inputs.parameters > theirs:
        yield Finding(
            "warning",
            f"the student has {inputs.parameters / 1e6:,.1f} million parameters, {teacher.section.name} "
            f"only {theirs / 1e6:,.1f}",
            "make sure that student.model and teacher.model are not exchanged",
        )


def _plain_text(inputs: Inputs) -> Iterator[Finding]:
    """The user's own task gives plain text, although the student has a chat template."""
    task = inputs.recipe.task
    if (
        not isinstance(task, PluginTask)
        or task.chat is False
        or not getattr(inputs.tokenizer, "chat_template", None)
    ):
        return
    if any(p.messages is None for p in inputs.stream.prompts["train"]):
        yield Finding(
            "warning",
            f"task.name: {task.name} gives prompts as plain text, so the student's chat template is not "
            "applied to them",
            "give Prompt(messages=[{'role': 'user', 'content': ...}]) instead of Prompt(text=...), or say "
            "that it is meant: task.chat: false",
        )


def _amounts(inputs: Inputs) -> Iterator[Finding]:
    """Numbers that do not fit together."""
    recipe = inputs.recipe
    learner, there = recipe.learner, len(inputs.stream.kept["train"]) * recipe.sampler.samples_per_prompt
    if learner.batch_samples > there:
        yield Finding(
            "warning",
            f"learner.batch_samples: a batch of {learner.batch_samples} is larger than the data ({there} "
            "samples of all training prompts), so each batch holds the same prompts several times",
            "lower it, or give more data",
        )
    if learner.warmup_steps >= learner.steps:
        yield Finding(
            "warning",
            f"learner.warmup_steps: {learner.warmup_steps} of {learner.steps} steps are warm-up, so "
            "learner.lr is "
            + ("reached in the last one only" if learner.warmup_steps == learner.steps else "never reached"),
            "lower it, or raise learner.steps",
        )


def _disk(inputs: Inputs, folder: Path) -> Iterator[Finding]:
    while not paths.exists(folder):
        folder = folder.parent
    # fp32 masters and two AdamW moments, `keep` times plus one that is being written; the export.
    state = 12 * inputs.trainable
    if inputs.recipe.schedule.lag:  # and the previous version's weights, as samplers have them
        cuda = bool(inputs.plan.samplers[0].devices)
        state += resolve_dtype(inputs.recipe.sampler.dtype, cuda).itemsize * elements(inputs.published)
    kept = 0
    if inputs.recipe.eval.keep_best is not None:  # the current best, and each checkpoint's
        cuda = bool(inputs.plan.samplers[0].devices)
        size = resolve_dtype(inputs.recipe.sampler.dtype, cuda).itemsize * elements(inputs.published)
        kept = size * (inputs.recipe.checkpoint.keep + 2)
    needed = 1.2 * (state * (inputs.recipe.checkpoint.keep + 1) + 4 * inputs.parameters + kept)
    free = shutil.disk_usage(folder).free
    if free < needed:
        yield Finding(
            "error",
            f"{folder} has {free / GB:.2f} GB free, checkpoints need about {needed / GB:.2f} GB",
            "free some, choose another --run-dir, or lower checkpoint.keep",
        )


def _transport(inputs: Inputs) -> Iterator[Finding]:
    if (wrong := misfit(inputs.recipe, inputs.plan)) is not None:
        yield Finding("error", *wrong)


def _memory(inputs: Inputs) -> Iterator[Finding]:
    recipe, plan = inputs.recipe, inputs.plan
    shared = arena_bytes(recipe, inputs.target_specs) + host_bytes(recipe, inputs.published)
    if shared > free_shared_memory():
        yield Finding(
            "error",
            f"shared memory: {shared / GB:.2f} GB are needed, /dev/shm has "
            f"{free_shared_memory() / GB:.2f} GB free",
            "in Docker add --ipc=host (or --shm-size); else lower learner.batch_samples or "
            "sampler.max_new_tokens",
        )
    sizes = [devices.memory(device) for device in range(devices.count())]
    if None in sizes:
        yield Finding(
            "note",
            "the memory of the CUDA devices is not known, so nothing is checked to fit, and placement.mode "
            "auto does not choose colocate",
            "pip install nvidia-ml-py, and see whether nvidia-smi shows the devices",
        )
    size = min(filter(None, sizes), default=None)
    found = memory.workers(recipe, plan, inputs.models, size or 80 * 10**9)
    if size is not None:
        for demand in memory.demands(plan, found):
            who = f"{demand.who} on cuda:{demand.device}"
            yield from _room(who, demand.parts, size, "the device", DEVICE_CURE)
    cure = COPY_CURE * recipe.checkpoint.staged + RAM_CURE
    yield from _room("the run", memory.host(plan, found, shared), available_memory(), "this machine", cure)


def _room(who: str, parts: memory.Parts, there: int, where: str, cure: str) -> Iterator[Finding]:
    """By arithmetic: more than `there` bytes is an error, more than nine tenths of them a warning."""
    needed = memory.total(parts)
    if needed > (1 - SPARE) * there:
        yield Finding(
            "error" if needed > there else "warning",
            f"{who} needs {needed / GB:.1f} GB by arithmetic, {where} has {there / GB:.1f} GB "
            f"(the largest parts: {memory.largest(parts)})",
            cure,
        )


def sanity(inputs: Inputs) -> Finding | None:
    """Student = teacher must give loss 0 and drift 0: sample a little, let the student judge itself, look at
    both.

    Loads the student on the CPU, with the engines of a run. What remains is this machine's noise floor.
    """
    from fopd_cli.engines.learner.learner import FsdpLearner
    from fopd_cli.engines.transformers.build import on_weights
    from fopd_cli.engines.transformers.teacher import TransformersTeacher
    from fopd_cli.runtime.build import learner_config
    from fopd_cli.samples import Request, Rollout, Sample, SampleId, SamplingParams, TeacherTargets

    recipe, dtype, cpu = inputs.recipe, torch.float32, torch.device("cpu")
    path = recipe.student.model
    sampler = on_weights(path, dtype, cpu, concurrency=4)
    params = SamplingParams(recipe.sampler.temperature, 1.0, min(32, recipe.sampler.max_new_tokens))
    asked = inputs.stream.kept["train"][:4]
    sampler.submit(
        [
            Request(i, inputs.stream.encoded("train", i), SampleId("train", 0, i, 0).seed(0), params)
            for i in asked
        ]
    )
    rollouts: list[Rollout] = []
    while sampler.busy:
        rollouts += sampler.step()
    width = hf.hidden_width(inputs.student_config)
    targets = [
        TeacherTargets("hidden", hidden=torch.empty(r.response_length, width, dtype=dtype)) for r in rollouts
    ]
    vocab, longest = hf.vocab_size(inputs.student_config), max(len(r.token_ids) for r in rollouts)
    judge = TransformersTeacher(
        hf.load_model(path, "student.model", dtype), cpu, 1, 4096, vocab, longest, recipe.learner.packing
    )
    judge.score(rollouts, targets)
    plain = recipe.learner.model_copy(update={"offload": False, "compile": False})
    config = learner_config(
        recipe.model_copy(update={"learner": plain}), dtype, vocab, longest, support="full", drift="sampled"
    )
    heads = [hf.load_head(path, "student.model", dtype)]
    learner = FsdpLearner(hf.load_model(path, "student.model", dtype), heads, config, cpu, 0, 1)
    stats = learner.evaluate([Sample(r, t, lag=0) for r, t in zip(rollouts, targets, strict=True)])
    loss, drift = float(np.abs(stats.kl).max()), float(np.abs(stats.drift_roll).max())
    limit = SANITY_LIMIT_NATS[dtype]
    if loss < limit and drift < limit:
        return None
    return Finding(
        "error",
        f"the student judged by itself has loss {loss:.2e} and drift {drift:.2e} nats, which should be 0 "
        f"(limit {limit})",
        "the sampler, teacher and learner disagree about this model; please report it with the model's name",
    )
