"""`scripts/gpu`: its code runs on a CPU, in tiny sizes; and what it does without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_report
import learner_kit as kit
import psutil
import pytest
import test_gpu
import torch
from conftest import ROOT, SLOW


def run(out: Path, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHON": sys.executable}
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


@SLOW
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    """Parts that need a missing package are skipped."""
    code, section = run(tmp_path, "--device", "cpu")
    states = dict(re.findall(r"^### (\w+): (\w+)$", section, re.M))
    assert list(states) == list(gpu_report.PARTS)
    assert "failed" not in states.values(), section
    assert states["varlen"] == states["memory"] == states["ranks"] == states["colocate"] == "done"
    assert code == 0
