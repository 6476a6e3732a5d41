"""The image has what the shipped recipes need. Read from the Dockerfile, as building it takes a daemon."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.tasks.swe.agent import INSTALL

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TEXT = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
STEPS = [line for line in TEXT.splitlines() if line and not line.startswith("#")]


def extras() -> set[str]:
    (found,) = re.findall(r'"\.\[([\w,]+)\]"', TEXT)
    return set(found.split(","))


def programs() -> set[str]:
    (found,) = re.findall(r"apt-get install -y --no-install-recommends([^&]*)", TEXT)
    return set(found.split())


def needs(recipe: Recipe) -> tuple[set[str], set[str]]:
    """(extras, Debian packages)."""
    packages, system = set(), {"python3"}
    if "vllm" in (recipe.sampler.engine, *(t.engine for t in recipe.teachers)):
        packages.add("vllm")
        system |= {"gcc", "libc6-dev", "python3-dev"}  # Triton compiles at run time
    if recipe.student.lora is not None:
        packages.add("lora")
    sources = [getattr(recipe.task, name, None) or "" for name in ("train", "eval")]
    if recipe.task.name in ("math", "chat") or any(s.startswith("hf:") for s in sources):
        packages.add("data")
    if recipe.task.name == "tool":
        packages.add("tools")
    if recipe.task.name == "swe":
        packages.add("swe")
        system.add("git")
    if getattr(recipe.task, "sandbox", None) == "bubblewrap":
        system.add("bubblewrap")
    return packages, system


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_finds_its_extras_and_programs(path: Path) -> None:
    packages, system = needs(load_recipe(path))
    assert packages <= extras()
    assert system <= programs()


def test_the_extras_are_the_projects_and_the_agent_is_the_tested_one() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras() <= set(known)
    (version,) = re.findall(r"mini-swe-agent==\S+", INSTALL)
    assert f"pip install --no-deps {version}" in TEXT  # its own requirements would replace packages
    for copied in re.findall(r"^COPY (?!\. \.)(.*) \S+$", TEXT, re.M):
        assert all((ROOT / name).exists() for name in copied.split())
    (constraints,) = re.findall(r"pip install -c (\S+)", TEXT)
    assert (ROOT / constraints).exists()


def test_it_runs_as_somebody_else_than_root_who_can_write_runs() -> None:
    """After the last step that installs, and with a home: caches go there."""
    user = max(i for i, step in enumerate(STEPS) if step.startswith("USER "))
    assert STEPS[user].split()[1] not in ("0", "root")
    assert not any(step.startswith("RUN") and "install" in step for step in STEPS[user:])
    assert re.search(rf"chown -R {STEPS[user].split()[1]}\S* /workspace/runs", TEXT)
    assert "ENV HOME=" in TEXT


def test_its_health_is_checked() -> None:
    (check,) = [step for step in STEPS if step.startswith("HEALTHCHECK")]
    assert "CMD fopd --version" in check


def test_the_models_that_docker_run_mounts_are_where_its_user_looks_for_them() -> None:
    (home,) = re.findall(r"^ENV HOME=(\S+)", TEXT, re.MULTILINE)
    page = (ROOT / "docs" / "engines.md").read_text()
    assert re.findall(r'/huggingface:(\S+)/\.cache/huggingface"', page) == [home]
