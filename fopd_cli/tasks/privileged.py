"""What only the teacher reads: its own version of a question, with a hint or a reference solution in it."""

from __future__ import annotations

import re
from dataclasses import replace

from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt

FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


def told(prompt: Prompt, template: str) -> Prompt:
    """The prompt as the teacher sees it: its text, or its last user message, put through the template.

    `{question}` is what the student is asked; every other field is a column of the prompt's payload. Braces
    around anything else (LaTeX, code) stay. Raises `UserError` for a column that the prompt does not have.
    """
    values = {k: v for k, v in prompt.payload.items() if v is not None}

    def fill(question: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1]
            if name != "question" and name not in values:
                raise UserError(
                    f"teacher.context: {prompt.where} has no column {name!r}; it has "
                    f"{', '.join(['question', *values])}"
                )
            return question if name == "question" else str(values[name])

        return FIELD.sub(value, template)

    if prompt.messages is None:
        return replace(prompt, text=fill(prompt.text or ""))
    last = max((i for i, m in enumerate(prompt.messages) if m["role"] == "user"), default=None)
    if last is None:
        raise UserError(f"teacher.context: {prompt.where} has no user message to put it into")
    messages = list(prompt.messages)
    messages[last] = {**messages[last], "content": fill(messages[last]["content"])}
    return replace(prompt, messages=messages)
