"""The documentation against the program. What is inside the site, `mkdocs build --strict` checks."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from fopd_cli import cli
from fopd_cli.engines.registry import ENGINES
from fopd_cli.recipe import Teacher, explain
from fopd_cli.recipe.renames import RENAMED

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "scripts" / "docs_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_key_with_its_default(reference: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| `(.*)` \| .+ \|$", reference.keys_page(), re.M)
    assert sorted((key, default) for key, _, default in rows) == sorted(
        (key.rpartition(".")[2], default) for key, _, default, _ in explain()
    )


def test_the_reference_has_each_section_once(reference: ModuleType) -> None:
    sections = re.findall(r"^## (.*)$", reference.keys_page(), re.M)
    assert len(set(sections)) == len(sections) > 20
    own = reference.keys_page().partition("## teacher\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", own, re.M) == [k for k in Teacher.model_fields if k not in ENGINES]


def test_the_reference_says_what_a_key_was_called_before(reference: ModuleType) -> None:
    page = html.unescape(reference.keys_page())
    assert re.search(
        r"^\| `max_lag` .* Its old name, schedule.depth, is read for one more version", page, re.M
    )
    assert "## freshness.reexecute\n\nIts old name, `freshness.replay`, is read for one more version" in page
    assert page.count("Its old name, ") == len(RENAMED)


def test_the_reference_has_every_command(reference: ModuleType) -> None:
    command = typer.main.get_command(cli.app)
    page = reference.cli_page()
    for name in command.list_commands(typer.Context(command)):  # type: ignore[attr-defined]
        assert f"## `fopd {name}`" in page


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_files_that_contributors_are_sent_to_are_there() -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[\w.]*|[a-z_]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    of_each_engine = {"record.py", "build.py"}
    missing = {n for n in named if not (ROOT / n).exists() and not (ROOT / "fopd_cli" / n).exists()}
    assert len(named) > 20
    assert missing <= of_each_engine


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900
