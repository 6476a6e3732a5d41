"""Whole runs whose weights are broadcast."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    RUN_TIMEOUT_S,
    SLOW,
    Fopd,
    check_accounts,
    descendants,
    lines,
    metrics,
    reach,
    small_recipe,
    summary,
    wait_for,
)
from run_kit import gone, start, worker

from fopd_cli.runtime.journal.rundir import RunDir

MODES: dict[str, dict[str, Any]] = {
    "max_lag 0, the best kept": {"schedule": {"max_lag": 0}, "eval": {"every": 2, "keep_best": "kl"}},
    "lag 2": {"schedule": {"lag": 2}, "sampler": {"max_new_tokens": 10, "concurrency": 3}},
}


@SLOW
@pytest.mark.parametrize("mode", MODES)
def test_a_run_by_broadcast_is_bitwise_one_through_shared_memory(fopd: Fopd, pair: Path, mode: str) -> None:
    """Resumed, too. Two sharded ranks of the learner gather what is sent."""
    runs = []
    for transport in ("shared", "broadcast"):
        recipe = small_recipe(pair, learner={"steps": 6}, checkpoint={"every": 2, "keep": 9}, **MODES[mode])
        if "lag" in MODES[mode]["schedule"]:
            recipe["schedule"] = MODES[mode]["schedule"]
        recipe["placement"] = {"transport": transport, "learner": 2, "threads": {"learner": 1}}
        runs.append(fopd.run(recipe, transport))
        whole = metrics(runs[-1])
        fopd("resume", runs[-1], "--step", "4")
        assert metrics(runs[-1]) == whole
    one, other = runs
    assert metrics(one) == metrics(other)
    assert lines(one / "ledger.jsonl") == lines(other / "ledger.jsonl")
    for run in runs:
        timing = [r["timing"] for r in lines(run / "metrics.jsonl") if r["kind"] == "step"]
        assert all(t["publish_seconds"] > 0 for t in timing)
    assert _files(RunDir.open(one).best) == _files(RunDir.open(other).best)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@SLOW
def test_samplers_killed_while_they_load_are_replaced(fopd: Fopd, pair: Path) -> None:
    """Right after a step, when all of them are loading its weights; one is also stopped for a while first, so
    that the learner is at the other end of a broadcast that does not move.
    """
    recipe = small_recipe(
        pair,
        learner={"steps": 40},
        schedule={"max_lag": 2},
        teacher={"delay_ms": 10, "batch_samples": 4},
        placement={"sampler": 2, "transport": "broadcast"},
        runtime={"restarts": 6},
    )
    process, run = start(fopd, recipe)
    rng = random.Random(3)
    victims: dict[str, psutil.Process] = {}
    for step, name, stopped_s in ((2, "sampler-0", 0.0), (4, "sampler-1", 2.0), (6, "sampler-0", 2.0)):
        reach(process, run, step)
        time.sleep(rng.uniform(0, 0.03))
        victim = victims[name] = worker(run, name, process.pid, before=victims.get(name))
        victim.suspend()
        time.sleep(stopped_s)
        victim.kill()
    family = descendants(process.pid)
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert summary(run)["restarts"] == 3
    prompts = check_accounts(run)
    assert prompts["trained"] + prompts["gated"] == 40 * 8
    wait_for(lambda: gone(family), "all that it started to end", 5.0)


def test_doctor_says_which_transport_does_not_fit(fopd: Fopd, pair: Path) -> None:
    path = fopd.recipe(small_recipe(pair, placement={"transport": "ipc"}))
    done = fopd("doctor", path, code=2)
    assert "placement.transport: ipc hands over memory of a CUDA device" in done.out + done.err
    assert "set it to shared or broadcast" in done.out + done.err
