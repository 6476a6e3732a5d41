"""Questions from files: rows become prompts, without repeats, and held-out questions are not trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from fopd_cli.errors import UserError
from fopd_cli.recipe import ChatTask, MathTask, ToolTask
from fopd_cli.samples import Prompt
from fopd_cli.tasks import held_out
from fopd_cli.tasks.conversations import asked
from fopd_cli.tasks.files import Row, column, read_rows
from fopd_cli.tasks.sections import takes

Split = Literal["train", "eval"]


class Questions:
    """`train` and `eval` are sources for `files.read_rows`; without `eval` some of `train` are held out. A
    column may be nested (`reward_model.ground_truth`).

    A question is a text or a list of chat messages. A final assistant answer is what the student is to write,
    so it is left out of the prompt; it is the `solution`, unless a column is named for that. Once the prompts
    were read, `notices` say what was done to how many rows.
    """

    @takes("math", MathTask)
    def __init__(self, options: ChatTask | MathTask | ToolTask) -> None:
        train, own = options.train, options.eval
        assert train is not None  # else the tool task makes its questions itself
        question, answer, eval_answer = options.question, None, None
        if not isinstance(options, ChatTask):
            answer, eval_answer = options.answer, options.eval_answer
        self.split_off = own is None
        self.sources: dict[Split, str] = {"train": train, "eval": train if own is None else own}
        self.questions: dict[Split, str] = {"train": question, "eval": options.eval_question or question}
        self.answers: dict[Split, str | None] = {"train": answer, "eval": eval_answer or answer}
        self.teacher, self.solution = options.teacher, options.solution
        self.template, self.system, self.chat = options.template, options.system, options.chat
        self.eval_prompts = options.eval_prompts
        self._notices: dict[Split, list[str]] = {}

    @property
    def notices(self) -> list[str]:
        if self.sources["train"] == self.sources["eval"] and "train" in self._notices:
            return self._notices["train"] + self._notices.get("eval", []) * self.split_off  # reported once
        return [notice for split in self._notices.values() for notice in split]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The distinct questions in file order; the first `eval_prompts` of the held-out source, which
        training skips.
        """
        kept = self._split_off() if self.split_off else self._held_out()
        if split == "eval":
            return kept
        known = {_identity(prompt) for prompt in kept}
        rest = [prompt for prompt in self._read("train") if _identity(prompt) not in known]
        if not rest:
            raise UserError(
                f"task.train: {self.sources['train']!r} has no question that task.eval does not hold out; "
                "give different files or lower task.eval_prompts"
            )
        return [replace(prompt, index=number) for number, prompt in enumerate(rest)]

    def _held_out(self) -> list[Prompt]:
        found = self._read("eval")
        shared = self.sources["train"] == self.sources["eval"]
        return found[: held_out.size(self.eval_prompts, len(found), shared)]

    def _split_off(self) -> list[Prompt]:
        """Held-out questions from the training file; if answers are graded, only questions that have one."""
        everyone = self._read("train")
        found = [p for p in everyone if self.answers["train"] is None or p.payload["answer"] is not None]
        if not found:
            raise UserError(
                f"task.train: no row of {self.sources['train']!r} has an answer, so none can be held out to "
                "be graded; set task.answer: null (task.name: chat)"
            )
        count = held_out.size(self.eval_prompts, len(found), shared=True)
        chosen = held_out.drawn([_identity(p) for p in found], count)
        self._notices["eval"] = [
            (
                f"task.eval: not given; {len(chosen)} of the {len(everyone)} questions of task.train are "
                "held out, drawn by their text"
            )
        ]
        return [replace(found[i], index=number) for number, i in enumerate(chosen)]

    def _read(self, split: Split) -> list[Prompt]:
        """The distinct questions of a source."""
        distinct: dict[str, Prompt] = {}
        rows, counts = read_rows(self.sources[split], f"task.{split}"), Counter[str]()
        for row in rows:
            prompt = self._prompt(len(distinct), row, split, counts)
            distinct.setdefault(_identity(prompt), prompt)
        counts["repeated"] = len(rows) - len(distinct)
        self._notices[split] = list(_notices(f"task.{split}", len(rows), counts, self.solution is None))
        return list(distinct.values())

    def _prompt(self, index: int, row: Row, split: Split, counts: Counter[str]) -> Prompt:
        source_key, name = f"task.{split}", self.questions[split]
        try:
            question, said = asked(column(row, name, source_key, "task.question"))
        except ValueError as error:
            raise UserError(
                f"{source_key}: {row.place}: column {name!r} {error}; leave the row out, or fix it"
            ) from None
        counts["said"] += said is not None
        columns = {"answer": self.answers[split], "solution": self.solution, "teacher": self.teacher}
        found = {
            key: None if name is None else column(row, name, source_key, f"task.{key}")
            for key, name in columns.items()
        }
        if self.answers[split] is not None and _blank(found["answer"]):
            found["answer"] = None
            if split == "eval":
                raise UserError(
                    f"{source_key}: {row.place}: column {self.answers[split]!r} is null or empty, so nothing "
                    "can be graded; leave the row out, or set task.answer: null (task.name: chat)"
                )
            counts["no answer"] += 1
        if isinstance(found["answer"], dict | list):
            first = next(iter(found["answer"]), 0) if isinstance(found["answer"], dict) else 0
            raise UserError(
                f"{source_key}: {row.place}: column {self.answers[split]!r} holds several values, and an "
                f"answer is one; name it, for example task.answer: {self.answers[split]}.{first}"
            )
        payload = {
            "answer": found["answer"],
            "solution": said if self.solution is None else found["solution"],
        }
        teacher = None if found["teacher"] is None else str(found["teacher"])
        messages = self._messages(question) if isinstance(question, str) else question
        if self.chat:
            return Prompt(index, messages=messages, payload=payload, teacher=teacher, place=row.place)
        if len(messages) > 1:
            raise UserError(
                f"{source_key}: {row.place} holds {len(messages)} messages, and without a chat template "
                "(task.chat: false) fopd cannot make one text of them; set task.chat: true"
            )
        return Prompt(index, text=messages[0]["content"], payload=payload, teacher=teacher, place=row.place)

    def _messages(self, question: str) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.template.replace("{question}", question)}]


def _blank(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _identity(prompt: Prompt) -> str:
    """All that the student sees of it: conversations that only end alike are different questions."""
    return json.dumps([prompt.text, prompt.messages], sort_keys=True, default=str)


def _notices(key: str, rows: int, counts: Counter[str], as_solution: bool) -> Sequence[str]:
    found = []
    if counts["said"]:
        use = "; it is {solution} for teacher.context" if as_solution else ""
        found.append(
            f"{key}: {counts['said']} of {rows} rows end with the assistant's answer, left out of the "
            f"prompt{use}"
        )
    if counts["repeated"]:
        found.append(f"{key}: {counts['repeated']} of {rows} rows repeat a question; each is used once")
    if counts["no answer"]:
        found.append(
            f"{key}: {counts['no answer']} of {rows} rows have no answer; they are trained on, but not graded"
        )
    return found
