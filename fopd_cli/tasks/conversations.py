"""From a row's question to the prompt: a text, or the messages before the answer that is wanted."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, NamedTuple

SHARE_GPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_response": "tool",
    "observation": "tool",
}


class Asked(NamedTuple):
    """`said` is the assistant's answer that followed the question, as in data for fine-tuning."""

    content: str | list[dict[str, Any]]
    said: str | None = None


def asked(value: Any) -> Asked:
    """What a row's question column holds. Raises `ValueError`, whose text says what is wrong with it."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):  # messages in a csv file's cell
        value = _messages_in(value)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, message, strict=False)) for message in zip(*value.values(), strict=False)]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return _conversation(value)
    if isinstance(value, bytes):
        raise ValueError("holds bytes, and no text in UTF-8")
    if value is None or value != value:  # nan is how pandas writes null
        raise ValueError("is null")
    if not str(value).strip():
        raise ValueError("is empty")
    return Asked(_encodable(str(value)))


def _messages_in(text: str) -> Any:
    """Parsed JSON, or a parsed list as Python prints it (and pandas writes it to csv files); other text
    unchanged.
    """
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    if re.search(r"""['"]role['"]\s*:""", text) and re.search(r"""['"]content['"]\s*:""", text):
        raise ValueError("looks like messages, but is neither JSON nor a list in Python's notation")
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a character ({text[error.start]!r})") from None
    return text


def _conversation(value: list[Any]) -> Asked:
    messages = [_message(number, message) for number, message in enumerate(value, 1)]
    said = None
    while messages and messages[-1]["role"] == "assistant":
        said = messages.pop().get("content") or said
    if not messages:
        raise ValueError("is empty" if not value else "holds no question, only the assistant's words")
    if all(m["role"] == "system" for m in messages):
        raise ValueError("holds no user message")
    return Asked(messages, said)


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message in the form that chat templates know. Nulls are dropped: tables add them for columns of other
    messages.
    """
    if isinstance(message, dict) and "from" in message and "role" not in message:
        message = {"role": str(message["from"]), "content": message.get("value")}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"has no role in message {number}; a message is {{role: user, content: ...}}")
    found = {name: value for name, value in message.items() if value is not None}
    role = found["role"].strip().lower()  # templates know these names, and mostly skip others silently
    found["role"] = SHARE_GPT.get(role, role)
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
    return {**found, "content": _encodable(content)}
