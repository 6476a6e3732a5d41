"""What a turn asks to be executed: every call of it, in whatever notation, and nothing that was only
thought.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from task_kit import built

from fopd_cli.samples import Prompt
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.calls import fenced, native, spoken
from fopd_cli.tasks.tool import Tool, parse

CODE = 'x = 1\nif x < 2:\n    print("a > b", {"k": [1, 2]})'


def xml(code: str) -> str:
    return f"<function=python>\n<parameter=code>\n{code}\n</parameter>\n</function>"


NOTATIONS = {
    "hermes": '<tool_call>\n{"name": "python", "arguments": {"code": %s}}\n</tool_call>',
    "parameters": '<tool_call>{"name": "python", "parameters": {"code": %s}}</tool_call>',
    "openai": (
        '<tool_call>{"type": "function", "function": {"name": "python", "arguments": {"code": '
        "%s}}}</tool_call>"
    ),
    "list": '<tool_call>[{"name": "python", "arguments": {"code": %s}}]</tool_call>',
    "not closed": '<tool_call>\n{"name": "python", "arguments": {"code": %s}}',
    "mistral": '[TOOL_CALLS] [{"name": "python", "arguments": {"code": %s}}]',
}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_calls_in_json(notation: str) -> None:
    assert parse("I will look.\n" + NOTATIONS[notation] % json.dumps(CODE), "native") == [(CODE, None)]
    text_as_arguments = {"name": "python", "arguments": json.dumps({"code": CODE})}
    assert parse(f"<tool_call>{json.dumps(text_as_arguments)}</tool_call>", "native") == [(CODE, None)]


@pytest.mark.parametrize(
    "turn",
    [
        f"<tool_call>\n{xml(CODE)}\n</tool_call>",
        f"First this.\n{xml(CODE)}",
        f"<tool_call>python\n<arg_key>code</arg_key>\n<arg_value>{CODE}</arg_value>\n</tool_call>",
        (
            '<tool_call><invoke name="python">\n<parameter '
            f'name="code">{CODE}</parameter>\n</invoke></tool_call>'
        ),
    ],
    ids=["qwen-coder", "without a frame", "glm", "invoke"],
)
def test_calls_in_xml(turn: str) -> None:
    assert parse(turn, "native") == [(CODE, None)]


def test_parallel_calls_are_all_kept_in_their_order() -> None:
    one = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
    assert [code for code, _ in parse(f"{one % 'a'}\n{one % 'b'}{one % 'c'}", "native")] == ["a", "b", "c"]
    both = '<tool_call>{"name": "f", "arguments": {}}\n{"name": "g", "arguments": {}}</tool_call>'
    assert [call.name for call in native(both)] == ["f", "g"]
    assert [call.name for call in native(f"<tool_call>{xml('1')}{xml('2')}</tool_call>")] == [
        "python",
        "python",
    ]
    assert [
        c.name for c in native('[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]')
    ] == ["f", "g"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        '"x"',
        '{"name": 1}',
        '{"name": "python"}',
        '{"name": "python", "arguments": 3}',
        '{"name": "python", "arguments": "{"}',
        '{"name": "bash", "arguments": {"code": "ls"}}',
        "<function=bash>",
        "<function=python></function>",
        "python\n<arg_key>code</arg_key>",
        "[" * 10_000,
        '{"function": 3}',
    ],
)
def test_what_is_no_call_is_said_and_nothing_is_raised(body: str) -> None:
    ((_, problem),) = parse(f"<tool_call>{body}</tool_call>", "native")
    assert problem


@pytest.mark.parametrize(
    ("turn", "code"),
    [
        ("<think>```python\nbad\n```</think>\n```python\ngood\n```", ["good\n"]),
        (
            "hm ```python\nbad\n``` no.\n</think>\n```python\ngood\n```",
            ["good\n"],
        ),  # the template opened the thought
        ("<think>```python\nbad\n```", []),  # never closed
        ("```python\nprint('<think>')\n```\nand\n```\n2\n```", ["print('<think>')\n", "2\n"]),
        ("[THINK]```python\nbad\n```[/THINK]```python\ngood\n```", ["good\n"]),
        (
            "a <think>```python\nbad\n```</think> b ```py\ngood\n``` <think>```python\nbad\n```</think>",
            ["good\n"],
        ),
        ("It is ```7```\nbecause of\n  ```Python title\ngood\n```", ["good\n"]),
        ("so: ```python\ngood\n```", ["good\n"]),
        ('```json\n{"a": 1}\n```\nwords\n```python\ngood\n```', ["good\n"]),  # a closing fence opens nothing
    ],
)
def test_only_what_is_said_is_executed(turn: str, code: list[str]) -> None:
    assert fenced(turn) == code


def test_calls_in_thoughts_are_thoughts() -> None:
    call = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
    assert parse(f"<think>{call % 'bad'}</think>{call % 'good'}", "native") == [("good", None)]
    assert parse(f"<think>{call % 'bad'}", "native") == []
    assert spoken("<think>a</think>b") == "b"


def converse(task: Tool, *turns: str) -> list[Observation]:
    async def go() -> list[Observation]:
        episode = task.episode(Prompt(0, messages=[{"role": "user", "content": "q"}]), 0)
        try:
            return [await episode.observe(t) for t in turns]
        finally:
            await episode.close()

    return asyncio.run(go())


def task(folder: Path, **options: Any) -> Tool:
    rows = folder / "q.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n')
    return built("tool", train=str(rows), eval=str(rows), sandbox="none", eval_prompts=1, **options)


def test_parallel_calls_are_executed_in_one_session_and_answered_one_by_one(tmp_path: Path) -> None:
    call = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
    (found,) = converse(
        task(tmp_path, notation="native", max_calls=2),
        call % "x = 20" + call % "print(x + 1)" + call % "print(9)",
    )
    assert found.role == "tool"
    assert found.text is not None
    assert list(found.text[:2]) == ["", "21"]
    assert "no more than 2 calls" in found.text[2]
    assert [c["ok"] for c in found.calls] == [True, True, False]


def test_all_blocks_of_a_turn_are_executed_and_answered_together(tmp_path: Path) -> None:
    (found,) = converse(task(tmp_path), "```python\nx = 20\n```\nthen\n```python\nprint(x + 1)\n```")
    assert found.text == "```output\n\n```\n```output\n21\n```"
    assert len(found.calls) == 2
    assert converse(task(tmp_path), "<think>```python\n1\n```</think>It is 2.")[0].text is None
