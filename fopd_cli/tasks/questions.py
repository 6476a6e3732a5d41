"""Questions from files: rows become prompts, without repeats, and held-out questions are not trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from fopd_cli.errors import UserError
from fopd_cli.recipe import ChatTask, MathTask, ToolTask
from fopd_cli.samples import Prompt
from fopd_cli.tasks import held_out
from fopd_cli.tasks.conversations import asked
from fopd_cli.tasks.files import Row, column, read_rows
from fopd_cli.tasks.sections import takes

Split = Literal["train", "eval"]


class Source(NamedTuple):
    """Where questions come from, and the columns that hold them. `key` names it in errors; `name` is that of
    a held-out set among several.
    """

    key: str
    source: str
    question: str
    answer: str | None
    held_out: bool = False
    name: str | None = None


class Questions:
    """`train` and `eval` are sources for `files.read_rows`; without `eval` some of `train` are held out. A
    column may be nested (`reward_model.ground_truth`).

    A question is a text or a list of chat messages. A final assistant answer is what the student is to write,
    so it is left out of the prompt; it is the `solution`, unless a column is named for that. Once the prompts
    were read, `notices` say what was done to how many rows.
    """

    @takes("math", MathTask)
    def __init__(self, options: ChatTask | MathTask | ToolTask) -> None:
        assert options.train is not None  # else the tool task makes its questions itself
        answer, eval_answer = None, None
        if not isinstance(options, ChatTask):
            answer, eval_answer = options.answer, options.eval_answer
        self.train = Source("task.train", options.train, options.question, answer)
        self.held_out = [
            Source(
                key,
                source,
                _column_of(options.eval_question, name) or options.question,
                _column_of(eval_answer, name) or answer,
                held_out=True,
                name=name,
            )
            for name, key, source in held_out.sources(options.eval)
        ]
        self.teacher, self.solution = options.teacher, options.solution
        self.template, self.system, self.chat = options.template, options.system, options.chat
        self.eval_prompts = options.eval_prompts
        self._notices: dict[str, list[str]] = {}

    @property
    def notices(self) -> list[str]:
        # what is said of the training file need not be said again
        again = {
            s.key for s in self.held_out if s.source == self.train.source and "task.train" in self._notices
        }
        return [notice for key, said in self._notices.items() if key not in again for notice in said]

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The distinct questions in file order; the first `eval_prompts` of each held-out source, which
        training skips.
        """
        kept = [p for source in self.held_out for p in self._held_out(source)] or self._split_off()
        if split == "eval":
            return [replace(prompt, index=number) for number, prompt in enumerate(kept)]
        known = {_identity(prompt) for prompt in kept}
        rest = [prompt for prompt in self._read(self.train) if _identity(prompt) not in known]
        if not rest:
            raise UserError(
                f"task.train: {self.train.source!r} has no question that task.eval does not hold out; "
                "give different files or lower task.eval_prompts"
            )
        return [replace(prompt, index=number) for number, prompt in enumerate(rest)]

    def _held_out(self, source: Source) -> list[Prompt]:
        found = self._read(source)
        return found[: held_out.size(self.eval_prompts, len(found), source.source == self.train.source)]

    def _split_off(self) -> list[Prompt]:
        """Held-out questions from the training file; if answers are graded, only questions that have one."""
        everyone = self._read(self.train)
        found = [p for p in everyone if self.train.answer is None or p.payload["answer"] is not None]
        if not found:
            raise UserError(
                f"task.train: no row of {self.train.source!r} has an answer, so none can be held out to "
                "be graded; set task.answer: null (task.name: chat)"
            )
        count = held_out.size(self.eval_prompts, len(found), shared=True)
        chosen = held_out.drawn([_identity(p) for p in found], count)
        self._notices["task.eval"] = [
            (
                f"task.eval: not given; {len(chosen)} of the {len(everyone)} questions of task.train are "
                "held out, drawn by their text"
            )
        ]
        return [found[i] for i in chosen]

    def _read(self, source: Source) -> list[Prompt]:
        """The distinct questions of a source."""
        distinct: dict[str, Prompt] = {}
        rows, counts = read_rows(source.source, source.key), Counter[str]()
        for row in rows:
            prompt = self._prompt(len(distinct), row, source, counts)
            distinct.setdefault(_identity(prompt), prompt)
        counts["repeated"] = len(rows) - len(distinct)
        self._notices[source.key] = list(_notices(source.key, len(rows), counts, self.solution is None))
        return list(distinct.values())

    def _prompt(self, index: int, row: Row, source: Source, counts: Counter[str]) -> Prompt:
        try:
            question, said = asked(column(row, source.question, source.key, "task.question"))
        except ValueError as error:
            raise UserError(
                f"{source.key}: {row.place}: column {source.question!r} {error}; leave the row out, or fix it"
            ) from None
        counts["said"] += said is not None
        columns = {"answer": source.answer, "solution": self.solution, "teacher": self.teacher}
        found = {
            key: None if name is None else column(row, name, source.key, f"task.{key}")
            for key, name in columns.items()
        }
        if source.answer is not None and _blank(found["answer"]):
            found["answer"] = None
            if source.held_out:
                raise UserError(
                    f"{source.key}: {row.place}: column {source.answer!r} is null or empty, so nothing "
                    "can be graded; leave the row out, or set task.answer: null (task.name: chat)"
                )
            counts["no answer"] += 1
        if isinstance(found["answer"], dict | list):
            first = next(iter(found["answer"]), 0) if isinstance(found["answer"], dict) else 0
            raise UserError(
                f"{source.key}: {row.place}: column {source.answer!r} holds several values, and an "
                f"answer is one; name it, for example task.answer: {source.answer}.{first}"
            )
        payload = {
            "answer": found["answer"],
            "solution": said if self.solution is None else found["solution"],
        }
        teacher = None if found["teacher"] is None else str(found["teacher"])
        messages = self._messages(question) if isinstance(question, str) else question
        prompt = Prompt(index, payload=payload, teacher=teacher, place=row.place, held_out=source.name)
        if self.chat:
            return replace(prompt, messages=messages)
        if len(messages) > 1:
            raise UserError(
                f"{source.key}: {row.place} holds {len(messages)} messages, and without a chat template "
                "(task.chat: false) fopd cannot make one text of them; set task.chat: true"
            )
        return replace(prompt, text=messages[0]["content"])

    def _messages(self, question: str) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.template.replace("{question}", question)}]


def _column_of(column: str | Mapping[str, str] | None, name: str | None) -> str | None:
    """The column in the held-out source of that name."""
    return column if column is None or isinstance(column, str) else column.get(name or "")


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
