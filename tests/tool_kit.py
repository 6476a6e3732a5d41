"""The tiny pair that uses a Python tool, and whether this machine has a sandbox for it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT, small_recipe

from fopd_cli.errors import UserError
from fopd_cli.sandbox import bubblewrap


def _problem() -> str | None:
    try:
        bubblewrap.check()
    except UserError as error:
        return str(error)
    return None


PROBLEM = _problem()


TOOL = ROOT / "recipes" / "tiny-tool"


needs_sandbox = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


def tool_recipe(**changes: Any) -> dict[str, Any]:
    sections = {
        "task": {"name": "tool", "train_prompts": 200, "eval_prompts": 8},
        "sampler": {"max_new_tokens": 120, "concurrency": 16},
    }
    recipe = small_recipe(TOOL, **{**sections, **changes})
    recipe["task"] = sections["task"] | changes.get("task", {})
    return recipe
