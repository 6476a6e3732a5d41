"""The documentation against the program. What is inside the site, `mkdocs build --strict` checks."""

from __future__ import annotations

import html
import importlib.util
import json
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


def test_what_freshness_control_costs_on_a_real_pair_is_that_of_the_runs() -> None:
    rows = [json.loads(line) for line in (ROOT / "docs/real-pair/race.jsonl").read_text().splitlines()]
    race = [r for r in rows if r["student"] == "default" and r["concurrency"] == 64]
    took = {p: [r["steps"][-1] for r in race if r["policy"] == p] for p in ("async", "fopd")}
    shares = [a / b for a, b in zip(took["async"], took["fopd"], strict=True)]
    said = "{:.0%} and {:.0%}".format(*shares)
    page = " ".join((ROOT / "docs/real-pair.md").read_text().split())
    assert "36 steps took {:.0f} and {:.0f} s with policy async".format(*took["async"]) in page
    assert "and {:.0f} and {:.0f} s with policy fopd".format(*took["fopd"]) in page
    assert f"{said} of async's throughput" in page
    assert f"| {said} over runs of 36 steps" in (ROOT / "docs/throughput.md").read_text()
    ends = {p: [r["kl"][-1][1] for r in race if r["policy"] == p] for p in took}
    assert "KL of {:.3f} and {:.3f}, fopd at {:.3f} and {:.3f}".format(*ends["async"], *ends["fopd"]) in page
    by_concurrency = {r["concurrency"]: r["steps"][-1] for r in rows if r["student"] == "even"}
    assert f"{by_concurrency[16]:.0f} s with 16, {by_concurrency[64]:.0f} with 64" in page
    (alone,) = (r for r in rows if r["student"] == "default" and r["concurrency"] == 16)
    assert f"fopd takes {alone['steps'][-1]:.0f} s" in page


def test_the_noise_floor_is_that_of_the_runs() -> None:
    folder = ROOT / "docs/staleness"
    text = [
        json.loads(line)
        for path in folder.glob("text-*/results.jsonl")
        for line in path.open(encoding="utf-8")
    ]
    of_sync = [r["drift_roll"] for r in text if r["policy"] == "sync"]
    of_vllm = [json.loads(line)["drift_roll"] for line in (folder / "noise-floor.jsonl").open()]
    page = " ".join((ROOT / "docs/staleness.md").read_text().split())
    assert f"a D_roll of {min(of_sync):.4f} to {max(of_sync):.4f} nats at lag 0" in page
    assert f"{min(of_vllm):.4f} to {max(of_vllm):.4f} with vLLM as the sampler" in page
