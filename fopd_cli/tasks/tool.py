"""Questions to be answered with a Python interpreter: the student writes code, sees what it prints, and
continues.

In the style of ReTool, in two notations: blocks of code fenced as ```python, answered by the user's next
message, or native calls of the chat template (`<tool_call>{"name": "python", "arguments": {"code":
...}}</tool_call>`, or XML), each answered by a tool message. All calls of a turn are executed in order;
thoughts are not calls. The interpreter keeps its state within an episode and runs in the sandbox. A turn
without a call is the answer.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from fopd_cli.errors import UserError
from fopd_cli.recipe import ToolTask
from fopd_cli.samples import Prompt
from fopd_cli.sandbox import bubblewrap
from fopd_cli.sandbox.interpreter import PythonSession
from fopd_cli.sandbox.limits import Limits, Outcome
from fopd_cli.tasks import held_out
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.calls import Call, fenced, native
from fopd_cli.tasks.math import Math
from fopd_cli.tasks.sections import takes

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?\d+")
PYTHON_TOOL = {
    "type": "function",
    "function": {
        "name": "python",
        "description": (
            "Run Python code; what it prints, or the value of its last line, comes back. State "
            "is kept between calls."
        ),
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}
STOPPED = {
    "timeout": "stopped: it took longer than {limits.wall_s:g} s",
    "memory": "stopped: it used more than {limits.memory_mb} MB",
    "disk": "stopped: its disk is full",
    "output": "stopped: it printed more than {limits.output_kb} kB",
    "died": "the interpreter died; its state is lost",
}


class Tool:
    """`train` and `eval` are as in the math task; without them, sums and products too hard for mental
    arithmetic.
    """

    @takes("tool", ToolTask)
    def __init__(self, options: ToolTask) -> None:
        if options.train is None and options.eval is not None:
            raise UserError("task.train: give it, too, or neither it nor task.eval for generated questions")
        self.sandboxed, self.notation = options.sandbox != "none", options.notation
        if self.sandboxed:
            bubblewrap.check()
        wall_s = options.wall_s
        self.limits = Limits(wall_s=wall_s, cpu_s=math.ceil(wall_s), memory_mb=options.memory_mb)
        self.max_calls, self.max_turns = options.max_calls, options.max_turns
        self.observation_chars = options.observation_chars
        self.drift, self.seed = options.drift, options.seed
        self.files = None if options.train is None else Math(options)
        self.generated = Calculations(options)
        if self.files is None and self.notation == "native":
            raise UserError(
                "task.notation: generated questions are plain text and have no native calls; set it to code"
            )

    @property
    def notices(self) -> list[str]:
        return [] if self.files is None else self.files.notices

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        prompts = self.generated.prompts(split) if self.files is None else self.files.prompts(split)
        for prompt in prompts:
            if self.notation == "native":
                prompt.tools.append(PYTHON_TOOL)
            prompt.payload["drifts"] = self.drift > 0 and split == "train"
        return prompts

    def grade(self, prompt: Prompt, response: str) -> float:
        """1 if the last turn's answer is right."""
        if self.files is not None:
            return self.files.grade(prompt, response)
        return float(BOXED.findall(response)[-1:] == [prompt.payload["answer"]])

    def episode(self, prompt: Prompt, now: int) -> ToolEpisode:
        return ToolEpisode(self, prompt.messages is not None, self._shift(prompt, now))

    def _shift(self, prompt: Prompt, now: int) -> int:
        """The error of the tool at a version: that of the newest change up to it, 0 if there was none."""
        for version in range(now, 0, -1) if prompt.payload.get("drifts") else ():
            rng = random.Random(f"{self.seed}/{prompt.index}/{version}")
            if rng.random() < self.drift:
                return rng.randint(1, 9)
        return 0


class ToolEpisode:
    """Implements `base.Episode`."""

    def __init__(self, task: Tool, chat: bool, shift: int = 0) -> None:
        self.task, self.chat, self.shift = task, chat, shift
        self.session = PythonSession(task.limits, task.sandboxed)
        self.turns = self.calls = 0

    async def observe(self, turn: str) -> Observation:
        self.turns += 1
        wanted = parse(turn, self.task.notation)
        if not wanted or self.turns >= self.task.max_turns:
            return Observation(None)
        calls = [await self._execute(code, problem) for code, problem in wanted]
        seen = [self._frame(call["output"]) for call in calls]
        if self.task.notation == "native":
            return Observation(seen if len(seen) > 1 else seen[0], "tool", calls)
        return Observation("\n".join(seen) if self.chat else "".join(seen), "user", calls)

    async def _execute(self, code: str, problem: str | None) -> dict[str, Any]:
        """Execute one call. Calls run in order: a later one may need what an earlier one left behind."""
        call: dict[str, Any] = {"tool": "python", "input": code, "ok": False, "seconds": 0.0}
        if self.calls >= self.task.max_calls:
            problem = f"no more than {self.task.max_calls} calls are allowed; give the answer"
        self.calls += 1
        if problem is None:
            outcome = await self.session.execute(code)
            call |= {"ok": outcome.reason == "exit" and outcome.code == 0, "seconds": outcome.seconds}
            problem = self._shown(outcome)
        return {**call, "output": problem}

    async def close(self) -> None:
        await self.session.close()

    def _shown(self, outcome: Outcome) -> str:
        """The output, with its middle left out if it is long, and the reason if it was stopped."""
        text, most = outcome.output.rstrip("\n"), self.task.observation_chars
        if self.shift:
            text = NUMBER.sub(lambda found: str(int(found[0]) + self.shift), text)
        if len(text) > most:
            text = (
                f"{text[: most // 2]}\n... {len(text) - most} characters left out ...\n{text[-(most // 2) :]}"
            )
        if outcome.reason != "exit":
            why = STOPPED[outcome.reason].format(limits=self.task.limits)
            text = f"{text}\n{why}" if text else why
        return text

    def _frame(self, text: str) -> str:
        """The output as the student sees it; in plain text, the frame stands in for the chat template's."""
        if self.task.notation == "native":
            return text
        block = f"```output\n{text}\n```"
        return block if self.chat else f"\n{block}\n"


def parse(turn: str, notation: Literal["code", "native"]) -> list[tuple[str, str | None]]:
    """(code, what is wrong with the call) of each call in a turn; without calls, the turn is the answer."""
    if notation == "code":
        return [(code, None) for code in fenced(turn)]
    return [_python(call) for call in native(turn)]


def _python(call: Call) -> tuple[str, str | None]:
    if call.problem is not None:
        return call.text, call.problem
    code = call.arguments.get("code")
    if call.name != "python" or not isinstance(code, str):
        return (
            call.text,
            f"there is no tool {call.name!r} that takes this; the tool is python, which takes code",
        )
    return code, None


class Calculations:
    """`37*52+18=`: products and sums, with operators' usual precedence."""

    def __init__(self, options: ToolTask) -> None:
        digits, terms, self.seed = options.digits, options.terms, options.seed
        train_prompts, eval_prompts = options.train_prompts, options.eval_prompts or held_out.DEFAULT
        self.digits, self.terms = digits, terms
        self.sizes = {"train": train_prompts, "eval": eval_prompts}
        space = (9 * 10 ** (digits - 1)) ** terms * 3 ** (terms - 1)
        if train_prompts + eval_prompts > space // 2:
            raise UserError(
                f"task: there are only {space} questions with task.digits {digits} and task.terms "
                f"{terms}; raise one of them"
            )

    def prompts(self, split: Literal["train", "eval"]) -> list[Prompt]:
        """Distinct questions; the held-out ones are drawn first."""
        rng = random.Random(f"tool/{self.seed}/{self.digits}/{self.terms}")
        questions: dict[str, None] = {}
        while len(questions) < self.sizes["eval"]:
            questions[self._question(rng)] = None
        if split == "train":
            held_out, questions = set(questions), {}
            while len(questions) < self.sizes["train"]:
                if (question := self._question(rng)) not in held_out:
                    questions[question] = None
        return [
            Prompt(index=i, text=f"{q}=", payload={"answer": str(eval(q))}) for i, q in enumerate(questions)
        ]

    def _question(self, rng: random.Random) -> str:
        low, high = 10 ** (self.digits - 1), 10**self.digits
        out = str(rng.randrange(low, high))
        for _ in range(self.terms - 1):
            out += rng.choice("+-*") + str(rng.randrange(low, high))
        return out


def scripted(question: str) -> tuple[str, str, str]:
    """An expert's episode on a generated question: the turn with the call, the observation, the turn with the
    answer.
    """
    expression = question.removesuffix("=")
    value = eval(expression)
    return f"```python\nprint({expression})\n```", f"\n```output\n{value}\n```\n", f"\\boxed{{{value}}}"
