"""Maths questions from a jsonl file or a hub dataset, graded by math-verify.

`\\boxed{}`, `#### answer` (GSM8K) and a plain final expression are understood, in the reference and in the response.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt
from fopd_cli.tasks.rows import read_rows

GRADE_TIMEOUT_S = 5


class _Row(NamedTuple):
    text: str  # that identifies it
    question: Any
    answer: Any
    solution: Any
    teacher: Any


class Math:
    """`train` and `eval` are paths of jsonl files or `hf:owner/name[@config][:split]`.

    A column may be nested (`reward_model.ground_truth`); a question may be a text or a list of chat messages.
    `answer: null` says that there are no reference answers: training needs none, and every grade is nan.
    """

    def __init__(
        self,
        train: str,
        eval: str,
        question: str = "question",
        answer: str | None = "answer",
        eval_question: str | None = None,
        eval_answer: str | None = None,
        solution: str | None = None,
        teacher: str | None = None,
        template: str = "{question}",
        system: str | None = None,
        chat: bool = True,
        eval_prompts: int = 256,
    ) -> None:
        if answer is not None and importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "task: grading needs the math-verify package: pip install 'fopd[data]' (or set task.answer: null)"
            )
        self.sources = {"train": train, "eval": eval}
        self.questions = {"train": question, "eval": eval_question or question}
        self.answers = {"train": answer, "eval": eval_answer or answer}
        self.teacher, self.solution = teacher, solution
        self.template, self.system, self.chat = template, system, chat
        self.eval_prompts = eval_prompts

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """The distinct questions in file order; the first `eval_prompts` of the held-out source, which training skips."""
        held_out = self._read("eval", limit=self.eval_prompts)
        if split == "eval":
            return self._to_prompts(held_out)
        known = {row.text for row in held_out}
        rows = [row for row in self._read("train") if row.text not in known]
        if not rows:
            raise UserError(
                f"task.train: {self.sources['train']!r} has no question that task.eval does not hold out; "
                "give different files or lower task.eval_prompts"
            )
        return self._to_prompts(rows)

    def grade(self, prompt: Prompt, response: str) -> float:
        """1 if math-verify finds the response's final answer equal to the reference, else 0; nan without one."""
        if prompt.payload.get("answer") is None:
            return math.nan
        gold, answer = final_answer(str(prompt.payload["answer"])), final_answer(response)
        if answer.strip() == gold.strip() and gold.strip():
            return 1.0
        return float(_verify(gold, answer))

    def _to_prompts(self, rows: Iterable[_Row]) -> list[Prompt]:
        prompts = []
        for i, row in enumerate(rows):
            messages = row.question if isinstance(row.question, list) else self._messages(str(row.question))
            shown: dict[str, Any] = {"messages": messages} if self.chat else {"text": messages[-1]["content"]}
            name = None if row.teacher is None else str(row.teacher)
            payload = {"answer": row.answer, "solution": row.solution}
            prompts.append(Prompt(index=i, payload=payload, teacher=name, **shown))
        return prompts

    def _messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.template.replace("{question}", question)}]

    def _read(self, split: str, limit: int | None = None) -> list[_Row]:
        """The distinct rows."""
        source, key = self.sources[split], f"task.{split}"
        rows = read_rows(source, key)
        distinct: dict[str, _Row] = {}
        for number, row in enumerate(rows, 1):
            where = f"{key}: row {number} of {source!r}"
            question = _column(row, self.questions[split], where, "task.question")
            text = str(question[-1]["content"] if isinstance(question, list) else question)
            columns = {"answer": self.answers[split], "solution": self.solution, "teacher": self.teacher}
            others = {
                name: None if column is None else _column(row, column, where, f"task.{name}")
                for name, column in columns.items()
            }
            distinct.setdefault(text, _Row(text, question, **others))
        return list(distinct.values())[:limit]


def _column(row: dict[str, Any], column: str, where: str, key: str) -> Any:
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{where} has no column {column!r}; it has {sorted(row)}; set {key} to the right one")
        value = value[part]
    return value


def final_answer(text: str) -> str:
    """What stands behind the last `####`, else the whole text (math-verify finds boxes and plain expressions)."""
    return text.rpartition("####")[2] if "####" in text else text


def _verify(gold: str, answer: str) -> bool:
    from math_verify import parse, verify  # an optional dependency, only the grader needs it

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    parsed_gold, parsed = _parse(parse, gold), _parse(parse, answer)
    return bool(parsed_gold and parsed and verify(parsed_gold, parsed, timeout_seconds=GRADE_TIMEOUT_S))


def _parse(parse: Any, text: str) -> list[Any]:
    # A bare "72" or "\frac12" is an expression only inside dollar signs.
    return list(parse(text, parsing_timeout=GRADE_TIMEOUT_S)) or list(
        parse(f"${text.strip()}$", parsing_timeout=GRADE_TIMEOUT_S)
    )
