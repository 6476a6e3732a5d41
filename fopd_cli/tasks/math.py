"""Maths questions from files, graded by math-verify.

`\\boxed{}`, `#### answer` (GSM8K) and a plain final expression are understood, in the reference and in the
response.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

from fopd_cli.errors import UserError
from fopd_cli.recipe import MathTask, ToolTask
from fopd_cli.samples import Prompt
from fopd_cli.tasks.questions import Questions
from fopd_cli.tasks.sections import takes

GRADE_TIMEOUT_S = 5


class Math(Questions):
    """Like `Questions`, with an answer column; `answer: null` says that there are no reference answers.

    Training needs none; every grade is then nan, and evaluations measure the KL to the teacher.
    """

    @takes("math", MathTask)
    def __init__(self, options: MathTask | ToolTask) -> None:
        if options.answer is not None and importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "task: grading needs the math-verify package: pip install 'fopd[data]' (or set "
                "task.answer: null)"
            )
        super().__init__(options)

    def grade(self, prompt: Prompt, response: str) -> float:
        """1 if math-verify finds the response's final answer equal to the reference, else 0; nan without
        one.
        """
        if prompt.payload.get("answer") is None:
            return math.nan
        gold, answer = final_answer(str(prompt.payload["answer"])), final_answer(response)
        if answer.strip() == gold.strip() and gold.strip():
            return 1.0
        return float(_verify(gold, answer))


def final_answer(text: str) -> str:
    """The text after the last `####`, else the whole text (math-verify finds boxes and plain expressions)."""
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
