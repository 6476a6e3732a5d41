"""From a row's question to what is asked: a text, or the messages up to the answer that is wanted."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_response": "tool", "observation": "tool"}  # fmt: skip


class Asked(NamedTuple):
    """`said` is the assistant's answer that stood behind the question, as in data for fine-tuning."""

    content: str | list[dict[str, Any]]
    said: str | None = None


def asked(value: Any) -> Asked:
    """What a row's question column holds. Raises `ValueError`, whose text says what is wrong with it."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # messages in a csv file's cell
        try:
            value = json.loads(value)
        except ValueError:
            return Asked(value)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, message, strict=False)) for message in zip(*value.values(), strict=False)]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return _conversation(value)
    if value is None or value != value:  # nan is how pandas writes null
        raise ValueError("is null")
    if not str(value).strip():
        raise ValueError("is empty")
    return Asked(str(value))


def _conversation(value: list[Any]) -> Asked:
    messages = [_message(number, message) for number, message in enumerate(value, 1)]
    said = None
    while messages and messages[-1]["role"] == "assistant":
        said = messages.pop().get("content") or said
    if not messages:
        raise ValueError("is empty" if not value else "holds no question, only the assistant's words")
    if all(m["role"] == "system" for m in messages):
        raise ValueError("holds no message of the user")
    return Asked(messages, said)


def _message(number: int, message: Any) -> dict[str, Any]:
    """In the form that chat templates know. What is null was put in by a table that has a column for it."""
    if isinstance(message, dict) and "from" in message and "role" not in message:
        role = str(message["from"])
        message = {"role": SHARE_GPT.get(role, role), "content": message.get("value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"has no role in message {number}; a message is {{role: user, content: ...}}")
    found = {name: value for name, value in message.items() if value is not None}
    content = found.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"has something else than text in message {number}")
        content = "".join(part["text"] for part in content)
    if content is None and found["role"] == "assistant" and found.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"has no text in message {number} (role {found['role']})")
    if not content.strip() and found["role"] == "user":
        raise ValueError(f"has an empty text in message {number} (role user)")
    return {**found, "content": content}
