"""Generated arithmetic modulo 10 with its steps written out; the recipe sets the number of dependent steps.

Prompt `7+5-9=`, response `7+5=2,2-9=3.3`: every step repeats the running value, applies the next operation
and writes the result; the answer follows the period. One wrong step spoils the answer, so exact match falls
with the horizon as (accuracy per step) ** horizon, which makes a student's compounding errors visible.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from fopd_cli.errors import UserError
from fopd_cli.recipe import ArithmeticTask
from fopd_cli.samples import Prompt
from fopd_cli.tasks.sections import takes

DEFAULT_TRAIN_PROMPTS = 20_000
OPERATORS = {1: "+", 2: "+-", 3: "+-*"}


class Arithmetic:
    """`horizon` dependent steps; `difficulty` 1: sums, 2: also differences, 3: also products."""

    @takes("arithmetic", ArithmeticTask)
    def __init__(self, options: ArithmeticTask) -> None:
        self.horizon, self.seed = options.horizon, options.seed
        self.operators = OPERATORS[options.difficulty]
        space = 10 * (10 * len(self.operators)) ** self.horizon
        train_prompts, eval_prompts = options.train_prompts, options.eval_prompts
        if train_prompts is None:
            train_prompts = min(DEFAULT_TRAIN_PROMPTS, space // 2 - eval_prompts)
        self.sizes = {"train": train_prompts, "eval": eval_prompts}
        if train_prompts < 1 or train_prompts + eval_prompts > space // 2:
            raise UserError(
                f"task: {max(train_prompts, 1)} training and {eval_prompts} held-out prompts are more than "
                f"half of the {space} questions with horizon {self.horizon} and difficulty "
                f"{options.difficulty}; raise task.horizon or ask for fewer"
            )

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        """Distinct questions; the held-out ones are drawn first, so they do not depend on `train_prompts`."""
        rng = random.Random(f"arithmetic/{self.seed}/{self.horizon}/{self.operators}")
        questions: dict[str, None] = {}
        while len(questions) < self.sizes["eval"]:
            questions[self._question(rng)] = None
        if split == "train":
            held_out = set(questions)
            questions = {}
            while len(questions) < self.sizes["train"]:
                question = self._question(rng)
                if question not in held_out:
                    questions[question] = None
        return [
            Prompt(
                index=i, text=question, payload={"answer": solve(question)[1], "solution": worked(question)}
            )
            for i, question in enumerate(questions)
        ]

    def grade(self, prompt: Prompt, response: str) -> float:
        """1 if the text after the last period is the answer, else 0."""
        return float(response.rpartition(".")[2].strip() == prompt.payload["answer"])

    def _question(self, rng: random.Random) -> str:
        steps = "".join(rng.choice(self.operators) + str(rng.randrange(10)) for _ in range(self.horizon))
        return f"{rng.randrange(10)}{steps}="


def solve(question: str) -> tuple[list[str], str]:
    """`7+5-9=` -> (["7+5=2", "2-9=3"], "3"): the worked steps and the answer, all modulo 10."""
    value, steps = int(question[0]), []
    for operator, digit in zip(question[1:-1:2], question[2:-1:2], strict=True):
        operand = int(digit)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10
        steps.append(f"{value}{operator}{operand}={result}")
        value = result
    return steps, str(value)


def worked(question: str) -> str:
    """The response that a perfect model writes."""
    steps, answer = solve(question)
    return ",".join(steps) + "." + answer
