"""Imports point one way, and heavy ones stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from fopd_cli.engines.registry import ENGINES
from fopd_cli.recipe import Teacher

PACKAGE = ROOT / "fopd_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

AN_ENGINE = {"engines.building", "engines.protocols", "engines.record"}
# Room -> rooms, or single modules of them, that it may import from, besides itself. A module belongs to the
# longest row that its path begins with, and one without a row fails: who adds a room says where it stands.
ALLOWED: dict[str, set[str]] = {
    # Leaves.
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "paths": set(),
    "tensors": set(),
    "names": set(),
    "samples": {"names"},
    "collapse": set(),
    # What is asked, and what is computed: losses, tasks and engines take their sections of the recipe as they
    # stand, so that no default is written twice.
    "recipe": {"engines.registry", "errors", "freshness.policies", "names", "paths"},
    "freshness": {"tensors", "samples"},
    "outlook": {"freshness.policies", "names", "recipe"},
    "losses": {"freshness", "names", "recipe"},
    "sandbox": {"errors"},
    "tasks": {"errors", "paths", "recipe", "samples", "sandbox"},
    # Engines: what all may know of them, without torch; models and tokens; one folder an engine, none of
    # which knows another's.
    "engines.record": {"engines.building", "names"},  # a type alone
    "engines.registry": {
        "engines.http.record",
        "engines.record",
        "engines.transformers.record",
        "engines.vllm.record",
        "names",
        "recipe",  # types alone
    },
    "engines.building": {"engines.protocols", "errors", "recipe"},
    "engines.auto": {"engines.models.hf", "engines.record", "engines.registry", "errors", "recipe"},
    "engines.__init__": set(),
    "engines.preload": {"engines.learner", "engines.models.library", "engines.transformers"},
    "engines.protocols": {"losses.head", "samples"},
    "engines.text": {"errors", "samples"},
    "engines.models": {"engines.text", "engines.tokens", "errors", "losses.head", "tasks.calls"},
    "engines.tokens": {"engines.models", "engines.transformers.cpu_attention", "errors", "samples"},
    "engines.renumbered_teacher": {"engines.protocols", "engines.text", "losses.head", "samples"},
    "engines.http": {*AN_ENGINE, "engines.tokens", "errors", "recipe", "samples"},
    "engines.resting": set(),
    "engines.transformers": {
        *AN_ENGINE,
        "engines.models",
        "engines.resting",
        "engines.tokens",
        "losses.head",
        "samples",
    },
    "engines.vllm": {
        *AN_ENGINE,
        "engines.learner.lora",
        "engines.models",
        "engines.tokens",
        "errors",
        "losses.head",
        "recipe",
        "samples",
    },
    "engines.learner": {
        "engines.models",
        "engines.resting",
        "engines.tokens",
        "errors",
        "freshness",
        "losses",
        "recipe",
        "samples",
    },
    # The runtime: the schedule knows neither workers nor disks, workers know no conductor.
    "runtime.__init__": set(),
    "runtime.memory": {"errors", "recipe", "samples"},
    "runtime.memory.model": {
        "engines.models.shapes",
        "engines.registry",
        "recipe",
        "runtime.crew.fleet",
        "runtime.memory.sizes",
        "runtime.placement",
        "runtime.weights.broadcast",
    },
    "runtime.time_model": {"recipe", "runtime.memory.model", "runtime.placement"},
    "runtime.placing": {
        "engines.learner.lora",
        "engines.models",
        "engines.registry",
        "recipe",
        "runtime.build",
        "runtime.devices",
        "runtime.memory.model",
        "runtime.placement",
    },
    "runtime.scheduling": {
        "engines.models.hf",
        "engines.registry",
        "engines.text.templates",
        "errors",
        "freshness.policies",
        "names",
        "recipe",
        "runtime.crew.messages",  # the messages alone, which are plain data
        "samples",
        "tasks",
    },
    "runtime.devices": {"errors"},
    "runtime.placement": {
        "engines.registry",
        "errors",
        "names",
        "recipe",
        "runtime.crew.fleet",
        "runtime.devices",
        "runtime.scheduling.tickets",  # the vocabulary alone: which roles take turns
    },
    "runtime.weights": {"errors", "recipe", "runtime.crew.fleet", "runtime.memory", "runtime.placement"},
    "runtime.build": {
        "engines",
        "errors",
        "freshness.policies",
        "losses.terms",
        "recipe",
        "runtime.crew.fleet",
        "runtime.memory",
        "runtime.placement",
        "runtime.scheduling.params",
        "runtime.weights.transport",
        "samples",
    },
    "runtime.crew": {
        "engines.models.hf",
        "engines.protocols",
        "engines.tokens.batching",
        "engines.registry",
        "engines.text",
        "errors",
        "freshness.supervision",
        "names",
        "recipe",
        "engines.preload",
        "runtime.build",
        "runtime.devices",
        "runtime.journal.checkpoint",
        "runtime.memory",
        "runtime.placement",
        "runtime.scheduling",  # roles and conversations, which know no worker
        "runtime.signals",
        "runtime.weights.transport",
        "samples",
        "tasks",
    },
    "runtime.journal": {
        "collapse",
        "engines.models.hf",
        "engines.text.pieces",
        "errors",
        "files",
        "paths",
        "recipe",
        "runtime.buffer",
        "runtime.state",  # what a checkpoint holds
        "runtime.crew.messages",
        "runtime.memory.held",
        "runtime.memory.weights",
        "runtime.scheduling",
        "samples",
    },
    "runtime.buffer": {
        "errors",
        "runtime.crew.messages",
        "runtime.journal.buffer_file",
        "runtime.memory.arena",
        "runtime.memory.held",
        "samples",
        "tasks.replay",
    },
    "runtime.control": {"freshness", "recipe", "samples"},
    "runtime.signals": {"errors", "runtime.crew.warm"},
    "runtime.state": {"inputs", "runtime.buffer", "runtime.control", "runtime.memory", "runtime.scheduling"},
    "runtime.conductor": {
        "engines.models.hf",
        "errors",
        "freshness",
        "inputs",
        "recipe",
        "runtime",
        "samples",
        "tasks.replay",
    },
    # The commands.
    "inputs": {"engines", "errors", "paths", "recipe", "runtime", "samples", "tasks"},
    "doctor": {"inputs", "engines", "errors", "outlook", "paths", "recipe", "runtime", "samples", "tasks"},
    "export": {"engines", "errors", "recipe", "report.reading", "runtime"},
    "teacher_kl": {"doctor", "inputs", "errors", "recipe", "runtime", "samples", "tasks.replay"},
    "evaluation": {
        "engines",
        "errors",
        "files",
        "paths",
        "recipe",
        "runtime",
        "samples",
        "tasks",
        "teacher_kl",
    },
    "chat": {"inputs", "engines", "errors", "recipe", "runtime.build", "samples"},
    "report": {
        "__init__",
        "errors",
        "files",
        "names",
        "paths",
        "recipe.changes",
        "recipe.renames",
        "runtime.journal.trace",
    },
    "suite": {
        "chat",  # whether a run's prompts go through the template
        "engines.models.hf",
        "engines.registry",
        "errors",
        "export",
        "paths",
        "recipe",
        "runtime.build",
        "runtime.journal.rundir",
        "runtime.placement",
    },
    "card": {"__init__", "files", "paths", "report.reading"},
    "new": {
        "doctor",
        "engines.models",
        "engines.text",
        "errors",
        "files",
        "inputs",
        "paths",
        "recipe",
        "runtime.placement",
        "runtime.placing",
        "samples",
        "tasks",
    },
    # A plan drives the conductor with engines that pretend, so it knows what a run knows, and no worker.
    "plan": {
        "engines.auto",
        "engines.models.hf",
        "engines.registry",
        "engines.text.templates",
        "errors",
        "inputs",
        "names",
        "outlook",
        "paths",
        "recipe",
        "report.reading",
        "runtime",
        "samples",
        "tasks",
    },
    "launch": {
        "doctor",
        "engines.models.downloads",
        "export",
        "inputs",
        "errors",
        "files",
        "paths",
        "plan.command",
        "plan.hardware",
        "recipe",
        "runtime",
    },
    "cli": {
        "__init__",
        "card",
        "chat",
        "doctor",
        "engines.models.hub",
        "errors",
        "evaluation",
        "export",
        "inputs",
        "launch",
        "new",
        "paths",
        "plan",
        "recipe",
        "report",
        "runtime.crew.openmp",
        "runtime.crew.warm",
        "runtime.devices",
        "runtime.journal.rundir",
        "runtime.placing",
        "suite",
    },
    "__main__": {"cli"},
}
OURS = re.compile(r"fopd_cli(\.\w+)+(:\w+)?")
ONLY_IN_ENGINES = {"transformers", "vllm", "huggingface_hub", "peft"}


def dotted(path: Path) -> str:
    """`runtime.crew.fleet`; a package's own file is its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


NAMES = {dotted(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """Those of strings, too: what is imported by its name, and when it is needed, is imported."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and OURS.fullmatch(str(node.value)):
            yield str(node.value).replace(":", ".")


def module_of(name: str) -> str:
    """The module that an import of ours names, or of which it names a member."""
    name = name.partition(".")[2]
    while name and name not in NAMES:
        if f"{name}.__init__" in NAMES:
            return f"{name}.__init__"
        name = name.rpartition(".")[0]
    return name or "__init__"


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def row(module: str) -> str | None:
    return max((room for room in ALLOWED if within(module, room)), key=len, default=None)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_directions(path: Path) -> None:
    here = dotted(path)
    room = row(here)
    assert room is not None, f"{here} has no row in ALLOWED: say what it may import"
    for name in imports(path):
        if name.split(".")[0] == "fopd_cli":
            target = module_of(name)
            assert any(within(target, r) for r in {room, *ALLOWED[room]}), f"{here} must not import {name}"
        if name.split(".")[0] in ONLY_IN_ENGINES:
            assert within(here, "engines"), f"{name} belongs into engines/"


def test_every_row_is_of_a_room_that_there_is() -> None:
    rooms = {*ALLOWED, *(name for row in ALLOWED.values() for name in row)}
    assert not [room for room in rooms if not any(within(module, room) for module in NAMES)]


@pytest.mark.parametrize("command", ["--help", "recipe --template"])
def test_a_command_that_computes_nothing_needs_no_torch(command: str) -> None:
    code = f"import sys; sys.argv = 'fopd {command}'.split()\n"
    code += "from fopd_cli.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_worker_imports_no_scikit_learn_and_a_task_can() -> None:
    """transformers would, and scipy, for what nothing here does; sklearn is in the extras of the suite."""
    pytest.importorskip("sklearn")
    code = "import sys, fopd_cli.engines.preload\n"
    code += "assert not {'sklearn', 'scipy', 'pandas'} & set(sys.modules)\nimport sklearn, scipy"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nobody_outside_engines_asks_which_engine_it_is(path: Path) -> None:
    """What there is to know of an engine stands in its record; a comparison is a new engine's trap."""
    if within(dotted(path), "engines") or dotted(path) == "suite":  # the harness's backends have such names
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = isinstance(node, ast.Constant) and node.value in ENGINES
        asks = isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Attribute) and side.attr == "engine"
            for side in [node.left, *node.comparators]
        )
        asks |= isinstance(node, ast.Match) and ast.unparse(node.subject).endswith(".engine")
        assert not names, f"{path}:{node.lineno} names an engine"
        assert not asks, f"{path}:{node.lineno} asks for an engine's name; engines/record.py has its facts"


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_a_folder_with_what_its_record_promises(name: str) -> None:
    engine = ENGINES[name]
    wanted = {
        "missing": True,
        "refusals": True,
        "sampler": engine.sampler is not None,
        "teacher": engine.teacher is not None,
        "remote": engine.remote,
    }
    assert {member for member in wanted if hasattr(engine.build, member)} == {m for m in wanted if wanted[m]}
    for key in [key for key in (engine.split, *(key for key, _ in engine.required)) if key is not None]:
        assert hasattr(engine.keys(Teacher(model="m")), key)


def test_every_test_module_has_a_name_of_its_own() -> None:
    """pytest imports them by it, so a second one is an error, but only where both are collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
