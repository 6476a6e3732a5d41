"""What a turn asks to execute: fenced blocks of code, or tool calls in the notations of models' chat
templates.

Thoughts are not executed: `<think>` ... `</think>`, or up to the first `</think>` if the template opened it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
MARKS = {*THOUGHTS, *THOUGHTS.values(), "<tool_call>", "</tool_call>", "[TOOL_CALLS]"}

# Fences and thoughts in one pattern, the leftmost first: a fence inside a thought is thought, and a mark
# inside a fence is code. One without a language must begin its line, so the end of an inline ```7``` opens
# nothing.
FENCE = r"(?:(?<![^\n])[ \t]*```|```(?=[^\s`]))(?P<language>[^\n`]*)\n(?P<code>.*?)```"
THOUGHT = "|".join(rf"{re.escape(a)}.*?(?:{re.escape(b)}|\Z)" for a, b in THOUGHTS.items())
PIECES = re.compile(rf"{THOUGHT}|{FENCE}", re.DOTALL)
PYTHON = {"", "python", "py", "python3"}

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LIST = re.compile(r"\[TOOL_CALLS\]\s*(\[.*|\{.*)", re.DOTALL)
FUNCTION = re.compile(
    r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)|<invoke name=\"([^\"]+)\">(.*?)(?:</invoke>|\Z)", re.DOTALL
)
PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>(.*?)</parameter>|<parameter name=\"([^\"]+)\">(.*?)</parameter>"
    r"|<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
    re.DOTALL,
)


class Call(NamedTuple):
    """One native call. `problem`: why it is invalid; `text` is what was written."""

    text: str
    name: str = ""
    arguments: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default, never changed)
    problem: str | None = None


def spoken(turn: str) -> str:
    """The turn without its thoughts."""
    rest = _after_opened_thought(turn)
    return PIECES.sub(lambda found: "" if found["code"] is None else found[0], rest)


def fenced(turn: str) -> list[str]:
    """Python code in fenced blocks, in order."""
    found = PIECES.finditer(_after_opened_thought(turn))
    return [
        p["code"]
        for p in found
        if p["code"] is not None and (p["language"].split() or [""])[0].lower() in PYTHON
    ]


def native(turn: str) -> list[Call]:
    """All tool calls of a turn in order, parallel ones included: JSON or XML in `<tool_call>`, XML alone, or
    Mistral's list.
    """
    text = spoken(turn)
    if (listed := LIST.search(text)) is not None:
        return _of_json(listed[1])
    if "<tool_call>" in text:
        return [call for body in CALL.findall(text) for call in _calls(body.strip())]
    return [call for found in FUNCTION.finditer(text) for call in _calls(found[0])]


def _after_opened_thought(turn: str) -> str:
    """What follows a thought that the turn ends without having begun it; else the whole turn."""
    for opened, closed in THOUGHTS.items():
        before, found, after = turn.partition(closed)
        if found and opened not in before:
            return after
    return turn


def _calls(body: str) -> list[Call]:
    functions = list(FUNCTION.finditer(body))
    if functions:
        return [Call(f[0], (f[1] or f[3]).strip(), _parameters(f[2] if f[1] else f[4])) for f in functions]
    if "<arg_key>" in body:  # GLM's: the name, then pairs
        return [Call(body, body.partition("<arg_key>")[0].strip(), _parameters(body))]
    return _of_json(body)


def _parameters(body: str) -> dict[str, Any]:
    """Values are text, without the line breaks that the notation puts around them."""
    found = {}
    for match in PARAMETER.finditer(body):
        name, value = next((match[i], match[i + 1]) for i in (1, 3, 5) if match[i] is not None)
        found[name.strip()] = value.removeprefix("\n").removesuffix("\n")
    return found


def _of_json(body: str) -> list[Call]:
    """One object, a list of them, or several one after another."""
    decoder, at, calls = json.JSONDecoder(strict=False), 0, list[Call]()
    while at < len(body):
        try:
            value, end = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            if calls:
                break  # words after the last call
            return [Call(body, problem=f"not a call of a tool: {type(error).__name__}: {error}")]
        calls += [
            _of_value(v, body[at:end]) for v in (value if isinstance(value, list) and value else [value])
        ]
        at = end + len(body[end:]) - len(body[end:].lstrip(" \t\r\n,;"))
    return calls or [Call(body, problem="not a call of a tool: it is empty")]


def _of_value(value: Any, text: str) -> Call:
    inner = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return Call(text, problem="not a call of a tool: it has no name")
    arguments = inner.get("arguments", inner.get("parameters", {}))
    if isinstance(arguments, str):  # as in OpenAI's API
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return Call(text, inner["name"], problem="not a call of a tool: its arguments are not a JSON object")
    return Call(text, inner["name"], arguments)
