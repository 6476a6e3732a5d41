"""What people do with runs that are there: report, runs, diff, fork. One real run, which all of it reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import SLOW, Fopd, check_accounts, lines, metrics, small_recipe, summary

from fopd_cli.report.reading import read

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> Iterator[Path]:
    """It holds the run `first`: four steps, evaluated and saved every two."""
    path = tmp_path_factory.mktemp("after")
    command = Fopd(path)
    command.run(small_recipe(pair, eval={"every": 2}, learner={"steps": 4, "clip": 1e-6}), "first")
    yield path
    command.stop_all()


@pytest.fixture
def here(folder: Path) -> Iterator[Fopd]:
    """The command, where the run is."""
    command = Fopd(folder)
    yield command
    command.stop_all()


def test_a_table_of_the_runs_that_are_here(here: Fopd, tmp_path: Path) -> None:
    head, row = here("runs", ".").out.splitlines()[:2]
    assert head.split() == ["name", "state", "step", "score", "KL", "hours", "process"]
    assert row.startswith("first  finished  4/4")
    last = summary(here.folder / "first")
    assert f"{last['kl_last']:.4f} ± {last['kl_last_error']:.4f}" in row
    assert "holds no run" in here("runs", tmp_path, code=2).err
    assert "is no directory" in here("runs", "nowhere", code=2).err


def test_the_report_of_a_real_run(here: Fopd) -> None:
    out = here("report", "first").out
    path = here.folder / "first" / "report.html"
    assert str(Path("first") / "report.html") in out
    text = path.read_text()
    assert path.stat().st_size < 3_000_000
    for what in ("KL to the teacher", "sampler-0: generate", "student, step 0", "student, step 4", "finished"):
        assert what in text
    assert "choose one of them" in here("report", "first", "--watch", "-o", "x.html", code=2).err


def test_a_fork_is_the_run_up_to_a_step_and_its_own_from_there(here: Fopd) -> None:
    """With nothing changed it is bitwise the run itself; `first` stays as it was."""
    first, fork = here.folder / "first", here.folder / "first-fork-2"
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    here("fork", "first", "--step", "2")
    assert metrics(fork) == metrics(first)
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
    check_accounts(fork)
    assert json.loads((fork / "forked-from.json").read_text()) == {"run": str(first.resolve()), "step": 2}
    assert "same in every key" in here("diff", "first", "first-fork-2").out
    assert "exists and is not empty; go on with it (fopd resume" in here("fork", "first", "--step", "2", code=2).err


def test_what_a_fork_sets_holds_from_its_step_on(here: Fopd) -> None:
    here("fork", "first", "--step", "2", "--run-dir", "hot", "--set", "learner.lr=5.0e-3")
    run = here.folder / "hot"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learner"]["lr"] == 5e-3
    assert [r["lr"] for r in metrics(run) if r["kind"] == "step"] == [1e-3, 1e-3, 5e-3, 5e-3]
    assert lines(run / "recipe-history.jsonl") == [{"step": 2, "changed": {"learner.lr": [1e-3, 5e-3]}}]
    out = here("diff", "first", "hot").out
    assert re.search(r"^learner\.lr +0\.001 +0\.005$", out, re.MULTILINE)
    kls = [summary(here.folder / name)["kl_last"] for name in ("first", "hot")]
    assert f"{kls[1] - kls[0]:+.4f}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "there is no checkpoint of step 3; there are [2, 4]"),
        (["--set", "seed=3"], "seed differ"),
        (["--step", "2", "--set", "learner.nonsense=3"], "unknown key"),
        (["--step", "2", "--set", "learner.steps=1"], "is less than the 2 steps that are done"),
    ],
)
def test_a_fork_that_is_refused_leaves_nothing(here: Fopd, arguments: list[str], message: str) -> None:
    assert message in here("fork", "first", "--run-dir", "refused", *arguments, code=2).err
    assert not (here.folder / "refused").exists()


@SLOW
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_all_curves_and_complains_of_nothing(here: Fopd, tmp_path: Path, dark: bool) -> None:
    here("report", "first", "first", "-o", tmp_path / "page.html")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--window-size=500,900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", f"file://{tmp_path / 'page.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = re.search(r'data-drawn="(\d+)"', done.stdout)
    assert drawn is not None
    assert int(drawn[1]) == done.stdout.count('class="uplot') >= 12
    assert len(read(here.folder / "first").steps) == 4
