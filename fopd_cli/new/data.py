"""Which columns of a file are the question and the answer, and whether an answer can be graded."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fopd_cli.errors import UserError
from fopd_cli.tasks.conversations import Asked, asked
from fopd_cli.tasks.files import Row, column, read_rows
from fopd_cli.tasks.math import final_answer

QUESTIONS = (
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "question",
    "problem",
    "instruction",
    "query",
    "input",
    "text",
)
ANSWERS = (
    "answer",
    "final_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "target",
    "label",
    "solution",
    "response",
    "output",
    "completion",
)
LOOKED_AT = 200  # rows
MOST = 0.9  # share of them that must fit for the column to count
SHORT = 40  # characters: a longer text is no final answer for math-verify


@dataclass(frozen=True)
class Data:
    """A file of questions. `answer` is the column to grade by, `reference` the one with whole responses;
    `asks` and `responses` come from the first rows.
    """

    source: str
    rows: int
    question: str
    answer: str | None
    reference: str | None
    asks: tuple[Asked, ...]
    responses: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def task(self) -> str:
        """The task's name in a recipe."""
        return "chat" if self.answer is None else "math"


def look(source: str, question: str | None = None, answer: str | None = None) -> Data:
    """Read a file and find the columns that are not named. Raises `UserError` if that is ambiguous."""
    rows = read_rows(source, "--data")
    first = rows[:LOOKED_AT]
    names = _columns(first)
    question = _found(first, question, "--question") or _question(first, names, source)
    asks = tuple(ask for row in first if (ask := _ask(row, question)) is not None)
    given = _found(first, answer, "--answer")
    texts = {name: _texts(first, name) for name in names if name != question}
    gradable = [n for n in ANSWERS if n in texts and _gradable(texts[n])]
    reference = next((n for n in ANSWERS if n in texts and texts[n] and n not in gradable), None)
    answers = graded = given or next(iter(gradable), None)
    notes = [f"questions are in column {question!r}"]
    if graded is not None and importlib.util.find_spec("math_verify") is None:
        notes.append(
            f"column {graded!r} could be graded, but math-verify is not installed (pip install "
            "'fopd[data]'); the KL to the teacher is the measure"
        )
        graded = None
    elif graded is not None:
        notes.append(f"answers in column {graded!r} are graded by math-verify")
    else:
        notes.append("no column holds short answers to grade by; the KL to the teacher is the measure")
    said = tuple(ask.said for ask in asks if ask.said)
    responses = said or tuple(texts.get(reference or "", ())) or tuple(texts.get(answers or "", ()))
    whole = responses if said or reference else _explained(responses)
    return Data(source, len(rows), question, graded, reference, asks, whole, tuple(notes))


def _columns(rows: Sequence[Row]) -> list[str]:
    """All columns of the rows, and the parts of nested ones, as `a.b`."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.values.items():
            names[name] = None
            if isinstance(value, dict):
                names |= {f"{name}.{part}": None for part in value}
    return list(names)


def _found(rows: Sequence[Row], name: str | None, option: str) -> str | None:
    if name is not None:
        column(rows[0], name, "--data", option)
    return name


def _question(rows: Sequence[Row], names: Sequence[str], source: str) -> str:
    """The column with a usual name, else the only one that holds questions."""
    lower = {name.lower(): name for name in names}
    usual = [lower[name] for name in QUESTIONS if name in lower]
    answers = [name for name in names if name.lower() in ANSWERS]
    others = [name for name in names if name not in answers and name not in usual]
    for candidates in (usual, others):
        good = [name for name in candidates if _asks(rows, name)]
        if candidates is usual and good:
            return good[0]
        if len(good) == 1:
            return good[0]
    raise UserError(
        f"--data: it is unclear which column of {source!r} holds the questions; it has {sorted(names)}; "
        "name it with --question"
    )


def _ask(row: Row, name: str) -> Asked | None:
    with contextlib.suppress(UserError, ValueError):
        value = column(row, name, "--data", "--question")
        return asked(value) if isinstance(value, str | list | dict) else None
    return None


def _texts(rows: Sequence[Row], name: str) -> list[str]:
    def texts() -> Iterator[str]:
        for row in rows:
            with contextlib.suppress(UserError):
                value = column(row, name, "--data", "--answer")
                if isinstance(value, str | int | float) and str(value).strip():
                    yield str(value)

    return list(texts())


def _asks(rows: Sequence[Row], name: str) -> bool:
    """Whether most rows have a question in this column."""
    return sum(_ask(row, name) is not None for row in rows) >= MOST * len(rows)


def _gradable(texts: Sequence[str]) -> bool:
    """Whether these are numbers and expressions: plain, boxed, or after `####`."""
    return bool(texts) and sum(map(_is_answer, texts)) >= MOST * len(texts)


def _is_answer(text: str) -> bool:
    boxed = "\\boxed" in text
    final = final_answer(text).strip()
    return boxed or (len(final) <= SHORT and re.search(r"\d|\\frac|\\sqrt|\\pi", final) is not None)


def _explained(texts: Sequence[str]) -> tuple[str, ...]:
    """Answers with their working show how long a response is; bare numbers do not."""
    return tuple(text for text in texts if len(text) > 2 * SHORT)
