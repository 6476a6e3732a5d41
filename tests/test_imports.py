"""Imports point one way, and heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "fopd_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Room -> rooms, or single modules of them, that it may import from, besides itself.
ALLOWED = {
    "tensors": set(),
    "samples": set(),
    "errors": set(),
    "recipe": {"errors", "paths", "freshness.policies"},
    "freshness": {"tensors", "samples"},
    "losses": {"freshness", "tensors", "samples"},
    "sandbox": {"errors"},
    "tasks": {"samples", "errors", "paths", "sandbox"},
    "engines": {"losses", "freshness", "tasks", "samples", "errors"},
}
ONLY_IN_ENGINES = {"transformers", "vllm", "huggingface_hub", "peft"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_directions(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.startswith("fopd_cli.") and here in ALLOWED:
            module = ".".join(name.split(".")[1:3])
            assert {room(name), module} & (ALLOWED[here] | {here}), f"{here} must not import {name}"
        if name.split(".")[0] in ONLY_IN_ENGINES:
            assert here == "engines", f"{name} belongs into engines/"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['fopd', '--help']\nfrom fopd_cli.cli import main\ntry: main()\nexcept "
        "SystemExit: pass\n"
    )
    code += "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
