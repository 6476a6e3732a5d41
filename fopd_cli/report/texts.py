"""The page's text: advice, answers over training, and how the recipes differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fopd_cli.recipe.changes import flattened
from fopd_cli.report.reading import Record, Run, jsonl

LONGEST = 1600  # characters shown of an answer
TEACHER_ROWS = "teacher.jsonl"  # from `fopd eval TEACHER --task RUN/recipe.yaml --out RUN/teacher.jsonl`


def advice(run: Run) -> list[str]:
    """The run's warnings and refreshes, and what its summary says."""
    found = [
        f"Step {w['step']}: {w['text']}" if w.get("step") else str(w["text"])
        for w in run.warnings
        if "text" in w
    ]
    for record in run.refreshes:
        found.append(f"Step {record['step']}: the buffer was refreshed ({record.get('reason')}).")
    if run.summary is not None and run.state == "finished":
        found += [str(run.summary[key]) for key in ("stopped_early", "advice") if run.summary.get(key)]
        if run.summary.get("collapsed"):
            found.append("By the paper's definition the run collapsed: its score ended far below its peak.")
        if run.summary.get("restarts"):
            found.append(f"Workers were lost and started again {run.summary['restarts']} times.")
    if run.state == "stopped":
        found.append(f"It stopped after step {run.step} of {run.planned}; go on with: fopd resume {run.path}")
    return found


class Piece(NamedTuple):
    """One of the student's tokens; `kl` in nats. `likeliest`: what the teacher would rather have written
    there, with probabilities, if the run recorded them.
    """

    text: str
    kl: float | None
    likeliest: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt; `who` says whose and when."""

    who: str
    text: str
    score: float | None
    finish: str | None
    kl: float | None = None  # to the teacher, nats per token
    pieces: Sequence[Piece] = ()  # its first tokens
    rest: str = ""  # what follows those tokens


def answers(run: Run, prompts: int = 3) -> list[tuple[str, list[Answer]]]:
    """For each held-out prompt: the prompt, and the student's early, halfway and latest answers, with the
    teacher's if recorded. Training prompts, as they came, if nothing else was recorded.
    """
    by_prompt = defaultdict[str, list[Record]](list)
    for sample in run.samples:
        if sample.get("kind") == "eval":
            by_prompt[str(sample.get("sample"))].append(sample)
    teacher = {
        f"eval/e0/p{r['prompt_index']}/s{r['sample']}/a0": r
        for r in jsonl(run.path / TEACHER_ROWS)
        if "sample" in r
    }
    found = []
    for name, samples in list(by_prompt.items())[:prompts]:
        shown = [_answer(s) for s in _early_halfway_now(samples)]
        if (row := teacher.get(name)) is not None:
            shown.append(
                Answer("teacher", shortened(str(row.get("response"))), row.get("score"), row.get("finish"))
            )
        found.append((shortened(str(samples[0].get("prompt"))), shown))
    if not found:
        for sample in _early_halfway_now(run.samples):
            found.append((shortened(str(sample.get("prompt"))), [_answer(sample)]))
    return found


def teacher_score(run: Run) -> float | None:
    """Mean score of the teacher's recorded rows; None if none has a score."""
    scores = [r["score"] for r in jsonl(run.path / TEACHER_ROWS) if r.get("score") is not None]
    return sum(scores) / len(scores) if scores else None


def _early_halfway_now(samples: list[Record]) -> list[Record]:
    picked = {0, len(samples) // 2, len(samples) - 1} if samples else set()
    return [samples[i] for i in sorted(picked)]


def _answer(sample: Record) -> Answer:
    text = shortened(str(sample.get("response")))
    pieces = [Piece(*piece) for piece in sample.get("pieces") or ()]
    who = f"student, step {sample.get('step')}"
    left = len(str(sample.get("response"))) - sum(len(piece.text) for piece in pieces)
    rest = f"\n[… {left:,} more characters]" if pieces and left > 0 else ""
    return Answer(who, text, sample.get("score"), sample.get("finish"), sample.get("kl"), pieces, rest)


def shortened(text: str) -> str:
    """The text; a long one without its middle."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) for each key in which the recipes differ."""
    recipes = [flattened(run.recipe) for run in runs]
    keys = dict.fromkeys(k for recipe in recipes for k in recipe)
    rows = [(key, [_shown(r.get(key, "-")) for r in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
