"""A model card of a run's student: what it is, what it was made of, how it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fopd_cli import __version__, paths
from fopd_cli.files import write_synced
from fopd_cli.report.reading import Record, Run, read

ROWS = 12  # in the table of evaluations: the first, the last and some in between


def write(run_dir: Path, out: Path, step: int, licence: str | None = None, name: str | None = None) -> Path:
    """Write `out/README.md`, the card of `step`'s student; the hub shows it as the model's page.

    It names local directories without their paths.
    """
    path = out / "README.md"
    write_synced(path, text(read(run_dir), step, licence, name))
    return path


def text(run: Run, step: int, licence: str | None = None, name: str | None = None) -> str:
    """Markdown with the YAML header that the hub reads."""
    student, teachers = run.recipe["student"], _teachers(run.recipe)
    measured = [e for e in run.evaluations if e["step"] <= step]
    title = name or run.name
    lines = [
        *_header(run, licence),
        f"# {title}",
        "",
        f"{_model(student['model'])}, distilled from {' and '.join(_model(t['model']) for t in teachers)} "
        f"by on-policy distillation: the student wrote {_tokens(run)} of its own answers, the teacher judged "
        "every token of them, and the student learned from that.",
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(run, step)),
        "",
        "## How it was measured",
        "",
        *_evaluations(measured),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(title)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(title)})",
        "```",
        "",
        "## Limits",
        "",
        "The figures are of the held-out prompts of one run and say nothing about other tasks. What the "
        "teacher gets wrong, the student was taught. The licenses of both models and of the data apply.",
    ]
    return "\n".join(lines) + "\n"


def _header(run: Run, licence: str | None) -> Iterator[str]:
    """Values are written as JSON, which is valid YAML. Local models and datasets are left out: the hub does
    not have them.
    """
    yield "---"
    yield "library_name: transformers"
    if licence is not None:
        yield f"license: {json.dumps(licence)}"
    base = [m for m in (run.recipe["student"]["model"],) if not _is_local(m)]
    if base:
        yield f"base_model: {json.dumps(base[0])}"
    sets = [s[3:].split("@")[0].split(":")[0] for s in _sources(run.recipe) if s.startswith("hf:")]
    if sets:
        yield f"datasets: {json.dumps(sorted(set(sets)))}"
    yield "tags: [on-policy-distillation, fopd]"
    yield "---"


def _facts(run: Run, step: int) -> Iterator[tuple[str, Any]]:
    recipe = run.recipe
    learner, loss, schedule = recipe["learner"], recipe["loss"], recipe["schedule"]
    yield "student", _model(recipe["student"]["model"])
    yield "teacher", ", ".join(_model(t["model"]) for t in _teachers(recipe))
    yield "data", ", ".join(_model(s.removeprefix("hf:")) for s in _sources(recipe)) or recipe["task"]["name"]
    yield "optimizer steps", f"{step} of {learner['batch_samples']} samples"
    yield "learning rate", f"{learner['lr']:g}, {learner['decay']}"
    yield "loss", f"{loss['kind'].replace('_', ' ')}, support {loss['support']}"
    lag = schedule["max_lag"] if schedule.get("lag") is None else schedule["lag"]
    yield "freshness", f"policy {recipe['freshness']['policy']}, lag at most {lag}"
    if recipe["student"].get("lora") is not None:
        yield "adapters", f"LoRA of rank {recipe['student']['lora']['rank']}, merged"
    yield "seed", recipe["seed"]
    yield "made with", f"fopd {__version__}"


def _evaluations(records: Sequence[Record]) -> Iterator[str]:
    """A table of at most `ROWS` records, the first and the last among them."""
    if not records:
        yield "It was not evaluated."
        return
    graded = any(r.get("score") is not None for r in records)
    yield (
        f"Held-out prompts: {records[-1]['prompts']}. KL is the student's divergence from the teacher on its "
        "own answers, in nats per token; less is better. ± is the standard error over prompts."
    )
    yield ""
    yield f"| step |{' score |' if graded else ''} KL |"
    yield f"|---|{'---|' if graded else ''}---|"
    stride = max(1, -(-(len(records) - 1) // (ROWS - 1)))
    for record in [*records[:-1:stride], records[-1]]:
        score = f" {_figure(record, 'score')} |" if graded else ""
        yield f"| {record['step']} |{score} {_figure(record, 'kl')} |"
    if sets := records[-1].get("sets"):
        yield ""
        yield f"These are of the held-out set {records[-1]['set']}. At step {records[-1]['step']}, by set:"
        yield ""
        yield "| set | prompts | score | KL |"
        yield "|---|---|---|---|"
        for name, own in sets.items():
            yield f"| {name} | {own['prompts']} | {_figure(own, 'score')} | {_figure(own, 'kl')} |"


def _figure(record: Record, key: str) -> str:
    value, error = record.get(key), record.get(f"{key}_error")
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _tokens(run: Run) -> str:
    count = (run.summary or {}).get("generated_tokens")
    return f"{count:,} tokens" if count else "some"


def _teachers(recipe: Record) -> list[Record]:
    teachers = recipe["teacher"]
    return teachers if isinstance(teachers, list) else [teachers]


def _sources(recipe: Record) -> list[str]:
    source = recipe["task"].get("train")
    return [source] if isinstance(source, str) else []


def _is_local(model: str) -> bool:
    return paths.exists(model)


def _model(name: str) -> str:
    return Path(name).name if _is_local(name) else name
