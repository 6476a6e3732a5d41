"""About twenty lines of YAML, each with its reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fopd_cli import paths
from fopd_cli.engines.text.templates import Frame
from fopd_cli.new.data import Data
from fopd_cli.new.models import Model, readable
from fopd_cli.samples import Prompt
from fopd_cli.tasks import held_out

# (parameters, AdamW learning rate that full fine-tuning bears up to that size): a start, not tuned values.
RATES = ((3e8, 1e-4), (1e9, 2e-5), (4e9, 5e-6), (math.inf, 1e-6))
EPOCHS = 3
FEWEST_STEPS, MOST_STEPS = 30, 400
WARM_UP = 10  # the learner's default; a short run gets a tenth of its steps
EVALUATIONS = 8
ROUND = 64  # tokens


@dataclass(frozen=True)
class Lengths:
    """Tokens, in the student's numbering; `response` is None where the data has none."""

    prompt: int  # the longest
    response: int | None  # 95% are at most this long


def measure(data: Data, student: Model, chat: bool) -> Lengths:
    """Lengths in the first rows."""
    frame = Frame(student.tokenizer)
    longest = max(len(frame.prompt(_prompt(n, ask.content, chat))) for n, ask in enumerate(data.asks))
    counts = [len(student.tokenizer(text)["input_ids"]) for text in data.responses]
    return Lengths(longest, int(np.percentile(counts, 95)) if counts else None)


def _prompt(index: int, content: Any, chat: bool) -> Prompt:
    if not chat:
        text = content if isinstance(content, str) else content[-1]["content"]
        return Prompt(index, text=text)
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return Prompt(index, messages=messages)


def text(folder: Path, student: Model, teacher: Model, data: Data, devices: int) -> tuple[str, list[str]]:
    """The recipe, to be written into `folder`, and the assumptions behind it."""
    chat = student.chats
    lengths = measure(data, student, chat)
    longest = _response(lengths, devices)
    held = held_out.size(None, data.rows, shared=True)
    batch = _batch(data.rows - held, devices)
    steps = min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(EPOCHS * (data.rows - held) / batch)))
    every = steps // min(EVALUATIONS, steps // WARM_UP)
    rate = next(rate for size, rate in RATES if student.parameters <= size)
    max_lag = 2 if devices < 2 else 4
    assumed = [
        *data.notes,
        f"{held} of {data.rows} questions are held out",
        _about_length(lengths, longest),
        (
            f"{steps} steps of {batch} samples, about {steps * batch / max(1, data.rows - held):.1f} times "
            "the data"
        ),
        f"learning rate {rate:g}, by the student's size; try a third and three times of it",
    ]
    if not chat:
        assumed.append(
            "the student has no chat template, so it reads questions as plain text (task.chat: false)"
        )
    graded = [f"  answer: {_value(data.answer)}"] if data.answer is not None else []
    lines = [
        "# Written by fopd new. All other keys have defaults: fopd recipe --explain [SECTION].",
        f"# {student}",
        f"student: {{model: {_value(_path(student.name, folder))}}}",
        f"# {teacher}",
        (
            "teacher: {model: "
            f"{_value(_path(teacher.name, folder))}{'' if teacher.packs else ', packing: false'}}}"
        ),
        "task:",
        f"  name: {data.task}  # {_meaning(data)}",
        f"  train: {_value(_path(data.source, folder))}  # {data.rows} rows; {held} are held out",
        f"  question: {_value(data.question)}",
        *graded,
        *([] if chat else ["  chat: false  # the student has no chat template"]),
        f"# The longest prompt has {lengths.prompt} tokens.",
        f"sampler: {{max_new_tokens: {longest}}}  # responses are cut off there",
        "learner:",
        f"  steps: {steps}",
        f"  batch_samples: {batch}",
        f"  lr: {rate:.1e}  # a start; try a third and three times of it",
        *([f"  warmup_steps: {steps // 10}"] if steps < 10 * WARM_UP else []),
        *([] if student.packs else ["  packing: false  # this architecture needs a row for each sample"]),
        *(["  activation_checkpointing: true"] if devices and student.parameters > 1e9 else []),
        (f"schedule: {{max_lag: {max_lag}}}  # in optimizer steps; 0: sampling and learning take turns"),
        f"eval: {{every: {every}}}",
        f"checkpoint: {{every: {every}}}",
    ]
    return "\n".join(lines) + "\n", assumed


def _response(lengths: Lengths, devices: int) -> int:
    """One and a half times the length in the data; without any, a length that suits the machine."""
    if lengths.response is None:
        return 512 if devices else 128
    wanted = ROUND * math.ceil(1.5 * lengths.response / ROUND)
    return min(max(wanted, ROUND), 4096 if devices else 256)


def _about_length(lengths: Lengths, longest: int) -> str:
    if lengths.response is None:
        return f"responses of at most {longest} tokens; the data has none to go by"
    return f"responses of at most {longest} tokens; 95% of those in the data have at most {lengths.response}"


def _batch(questions: int, devices: int) -> int:
    """A power of two, at most the number of questions."""
    most = 64 if devices else 16
    return max(1, min(most, 2 ** int(math.log2(max(1, questions)))))


def _meaning(data: Data) -> str:
    return (
        "nothing is graded; the KL to the teacher is the measure"
        if data.answer is None
        else "graded by math-verify"
    )


def _path(name: str, folder: Path) -> str:
    """As the recipe finds it: relative if it is below the recipe's folder, else absolute; hub names
    unchanged.
    """
    if name.startswith("hf:") or not paths.exists(name):
        return name
    whole = Path(name).expanduser().resolve()
    with_folder = folder.resolve()
    return str(whole.relative_to(with_folder)) if whole.is_relative_to(with_folder) else str(whole)


def _value(text: str | None) -> str:
    """A YAML scalar; JSON strings are valid YAML."""
    assert text is not None
    plain = text.replace("/", "").replace("_", "").replace("-", "").replace(".", "")
    return (
        text if plain.isalnum() and not plain.isdigit() and plain.lower() not in _WORDS else json.dumps(text)
    )


_WORDS = {"null", "true", "false", "yes", "no", "on", "off"}

__all__ = ["Lengths", "measure", "readable", "text"]
