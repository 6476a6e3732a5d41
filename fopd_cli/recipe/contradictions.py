"""Contradictions between keys that are each valid alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fopd_cli.engines.registry import candidates, engine_of, hands_over, unfit_to_sample
from fopd_cli.freshness.policies import POLICIES, largest_xi

ADDRESS = re.compile(r"https?://[^\s/?#]+(/\S*)?", re.ASCII)

if TYPE_CHECKING:
    from fopd_cli.recipe.schema import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """One sentence for each: the key, what is wrong, what to do."""
    loss, fresh, max_lag = recipe.loss, recipe.freshness, recipe.max_lag
    policy = POLICIES[fresh.policy]
    largest = largest_xi(max_lag)
    if policy.weights != "one" and fresh.xi >= largest:
        yield (
            f"freshness.xi: {fresh.xi} gates out every sample of full lag, because f <= 1/(lag + 1) = "
            f"{largest:.4g} at lag {max_lag}; choose xi under {largest:.4g} or lower schedule.max_lag"
        )
    if fresh.policy == "sync" and max_lag > 0:
        yield (
            f"freshness.policy: sync means schedule.max_lag 0, but the lag may be {max_lag} here; set "
            "schedule.max_lag: 0"
        )
    yield from _of_teachers(recipe)
    yield from _of_evaluations(recipe)
    yield from _of_prompts(recipe)
    support = recipe.support
    if policy.trust and support not in ("sampled", "mc"):
        yield (
            f"freshness.policy: {fresh.policy} leaves out sampled tokens by their advantage, and "
            f"loss.support {support} has none; set freshness.policy: fopd (such losses need no trust region, "
            "see docs/staleness.md) or loss.support: sampled"
        )
    if support == "topk" and not loss.tail:
        yield (
            "loss.tail: a top-k divergence without a tail class lets the student hide mass outside the top k "
            "(and a truncated forward KL can go negative); set loss.tail: true"
        )
    if support in ("sampled", "mc") and loss.kind != "reverse_kl":
        yield (
            f"loss.kind: {support} support is the policy gradient of reverse_kl, {loss.kind} has none; "
            "set loss.kind: reverse_kl"
        )
    yield from _of_sampler(recipe)
    yield from _of_placement(recipe)
    yield from _of_supports(recipe)
    if support in ("full", "mc") and recipe.targets != "hidden":
        yield (
            f"teacher.targets: loss.support {support} needs hidden states, not {recipe.targets}; set "
            "teacher.targets: hidden"
        )
    if support == "topk" and recipe.targets != "topk":
        yield (
            f"teacher.targets: loss.support topk needs top-k log-probs, not {recipe.targets}; set "
            "teacher.targets: topk"
        )
    if recipe.learner.optimizer_dtype == "bf16" and recipe.learner.betas[1] > 0.99:
        yield (
            "learner.optimizer_dtype: bf16 keeps 8 bits, and an average over 1/(1 - "
            f"{recipe.learner.betas[1]}) steps would be rounded "
            "away; set learner.betas: [0.9, 0.95] or optimizer_dtype: fp32"
        )
    if fresh.drift in ("topk", "exact") and recipe.sampler.top_p < 1:
        yield (
            f"freshness.drift: {fresh.drift} needs the untruncated behaviour policy; set sampler.top_p: "
            "1 or drift: sampled"
        )


def _of_sampler(recipe: Recipe) -> Iterator[str]:
    """What the sampler's engine (for auto: every candidate) does not offer."""
    section = recipe.sampler
    unfit = [unfit_to_sample(engine, recipe) for engine in candidates(section)]
    if all(unfit) and "loss.support: mc" in unfit:
        yield (
            f"loss.support: mc needs draws beside the response, which sampler.engine {section.engine} does "
            "not give; set sampler.engine: transformers or loss.support: sampled"
        )
    if all(unfit) and "student.lora.publish: adapter" in unfit:
        yield (
            f"student.lora.publish: sampler.engine {section.engine} takes merged weights only; "
            "set publish: merged or sampler.engine: vllm"
        )


def _of_placement(recipe: Recipe) -> Iterator[str]:
    """A transport of weights that no machine could use in this mode."""
    mode, transport = recipe.placement.mode, recipe.placement.transport
    if transport in ("broadcast", "ipc") and mode == "timeslice":
        yield (
            f"placement.transport: {transport} reads from a learner that is awake, and with placement.mode "
            "timeslice it sleeps while samplers load; set transport: shared"
        )
    if transport == "broadcast" and mode == "colocate":
        yield (
            "placement.transport: broadcast needs learner and samplers on different devices, and with "
            "placement.mode colocate they share them; set transport: ipc or shared"
        )
    if transport == "ipc" and mode in ("cpu", "partition"):
        yield (
            "placement.transport: ipc needs learner and samplers on the same CUDA device, which "
            f"placement.mode {mode} excludes; set transport: broadcast or shared"
        )


def _of_supports(recipe: Recipe) -> Iterator[str]:
    """Keys that only some supports use."""
    loss, support = recipe.loss, recipe.support
    if support == "topk" and loss.temperature != 1:
        yield "loss.temperature: top-k log-probs come at temperature 1 and cannot be re-tempered; set it to 1"
    if support in ("sampled", "mc") and loss.temperature != 1:
        yield (
            f"loss.temperature: {support} support is about tokens drawn at sampler.temperature and has no "
            "separate temperature; set it to 1 (see sampler.temperature and loss.teacher_temperature)"
        )
    if loss.teacher_temperature == "sampler" and support not in ("sampled", "mc"):
        yield (
            f"loss.teacher_temperature: belongs to loss.support sampled and mc; {support} has "
            "loss.temperature; set it to one"
        )
    if loss.teacher_temperature == "sampler" and support == "sampled" and recipe.targets != "hidden":
        yield (
            f"loss.teacher_temperature: {recipe.targets} log-probs come at temperature 1; set "
            "teacher.targets: hidden, or teacher_temperature: one"
        )
    if loss.max_ratio is not None and not (support == "mc" or (support == "sampled" and recipe.importance)):
        yield (
            f"loss.max_ratio: loss.support {support} has no importance ratio here; leave it out, or use "
            "mc, or sampled with importance: true"
        )
    if loss.student_k and support != "topk":
        yield f"loss.student_k: belongs to loss.support topk, not {support}; set it to 0"
    for t in recipe.teachers if loss.student_k else ():
        if not any(e.teacher is not None and e.teacher.asked_tokens for e in candidates(t)):
            yield (
                f"loss.student_k: teacher.engine {t.engine} gives log-probs of its own likeliest tokens "
                "only; set it to 0 or teacher.engine: transformers"
            )
        if t.k <= loss.student_k:
            yield (
                f"loss.student_k: {loss.student_k} leaves none of the teacher's {t.k} classes to the "
                "teacher; raise teacher.k"
            )


def _of_evaluations(recipe: Recipe) -> Iterator[str]:
    """Keys that compare several evaluations."""
    section = recipe.eval
    if section.patience and section.keep_best is None:
        yield "eval.patience: needs to know what is best; set eval.keep_best: score or kl"
    if section.keep_best is not None and not 0 < section.every < recipe.learner.steps:
        yield (
            "eval.keep_best: there are no evaluations to choose from; set eval.every to fewer steps than "
            "learner.steps"
        )
    if section.keep_best == "score" and (
        recipe.task.name == "chat" or getattr(recipe.task, "answer", "") is None
    ):
        yield "eval.keep_best: score, but nothing is graded in this task; set it to kl"


def _of_prompts(recipe: Recipe) -> Iterator[str]:
    """Chat template keys that no chat template would read."""
    own_template = any(t.template == "teacher" for t in recipe.teachers)
    if getattr(recipe.task, "chat", True) is not False:
        return
    if getattr(recipe.task, "system", None):
        yield (
            "task.system: plain text (task.chat: false) has no system message; put the text into "
            "task.template"
        )
    if recipe.template_kwargs and not own_template:
        yield (
            "task.chat_template_kwargs: no chat template is rendered with task.chat: false; leave one "
            "of them out"
        )


def _of_teachers(recipe: Recipe) -> Iterator[str]:
    """What is wrong with a teacher, or with several together."""
    teachers = recipe.teachers
    names = [t.name for t in teachers]
    if len(set(names)) < len(names):
        yield (
            f"teacher.name: {max(names, key=names.count)!r} is there twice; give each teacher its own name"
        )
    for t in teachers:
        if not re.fullmatch(r"[A-Za-z0-9_.]+", t.name):
            yield (
                f"teacher.name: {t.name!r} must be letters, digits, '_' or '.'; prompts and log files use it"
            )
        if "hidden" in (t.targets, recipe.targets) and not hands_over("hidden", t):
            why = (
                "loss.teacher_temperature sampler"
                if recipe.support == "sampled"
                else f"loss.support {recipe.support}"
            )
            asking = t.model_copy(update={"targets": "hidden"})
            asked = "teacher.targets: hidden, " if hands_over("hidden", asking) else ""
            yield (
                f"teacher.engine: {t.engine} gives log-probs, not the hidden states that {why} needs; "
                f"set loss.support: topk (or auto), {asked}or teacher.engine: transformers"
            )
        engine = engine_of(t)
        if engine.remote and t.template == "teacher":
            yield (
                "teacher.template: the chat template of a remote teacher is not known here; set "
                "teacher.template: student"
            )
        for key, what in engine.required:
            if getattr(engine.keys(t), key) is None:
                yield f"teacher.{engine.name}.{key}: engine {engine.name} needs {what}"
        if t.http.url is not None and not (t.http.url.isascii() and ADDRESS.fullmatch(t.http.url)):
            yield f"teacher.http.url: {t.http.url!r} is not a URL; write it like http://localhost:8000/v1"
    for key, values in (("targets", {t.targets for t in teachers}), ("k", {t.k for t in teachers})):
        if len(values) > 1 and (key == "targets" or recipe.targets == "topk"):
            yield f"teacher.{key}: {', '.join(map(str, sorted(values)))}: all teachers must have the same"
