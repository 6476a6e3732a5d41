"""Rows of a jsonl file or a hub dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fopd_cli.errors import UserError


def read_rows(source: str, key: str) -> list[dict[str, Any]]:
    """All rows of a jsonl file's path or `hf:owner/name[@config][:split]`; at least one. `key` names it in errors."""
    rows = _hub_rows(source, key) if source.startswith("hf:") else _jsonl_rows(Path(source), key)
    if not rows:
        raise UserError(f"{key}: {source!r} has no rows")
    return rows


def _jsonl_rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read {str(path)!r}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{key}: line {number} of {str(path)!r} is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise UserError(f"{key}: line {number} of {str(path)!r} is no JSON object")
        rows.append(row)
    return rows


def _hub_rows(source: str, key: str) -> list[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{key}: {source!r} needs the datasets package: pip install 'fopd[data]'") from None
    name, _, split = source.removeprefix("hf:").partition(":")
    name, _, config = name.partition("@")
    try:
        return list(load_dataset(name, config or None, split=split or "train"))
    except Exception as error:
        raise UserError(f"{key}: cannot load {source!r} from the hub: {error}") from None
