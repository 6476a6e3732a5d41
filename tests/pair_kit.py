"""Copies of the tiny pair that differ in one thing, and data for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from conftest import TINY


def changed(folder: Path, name: str, **files: Any) -> Path:
    """A copy of the tiny student or teacher; `files` are functions that change its JSON files, by their
    stem.
    """
    out = folder / f"{name}-{len(list(folder.iterdir()))}"
    shutil.copytree(TINY / name, out)
    for stem, change in files.items():
        path = out / f"{stem}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return out


def exchanged(first: str, second: str) -> Any:
    """Of a tokenizer.json: the two tokens have each other's ids."""

    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        for token in content["added_tokens"]:
            token["id"] = vocabulary[token["content"]]
        content["added_tokens"].sort(key=lambda t: t["id"])

    return change


def conversations(folder: Path, count: int = 24) -> str:
    path = folder / "talks.jsonl"
    talks = [
        [{"role": "user", "content": f"{i}+{i % 7}="}, {"role": "assistant", "content": "?"}]
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return str(path)
