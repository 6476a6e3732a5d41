"""Real interruptions of every kind: nothing is lost, nothing is left behind, the error names the culprit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
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
    steps_done,
    summary,
    wait_for,
)
from run_kit import checkpoints, gone, start, worker

from fopd_cli.runtime.journal.checkpoint import verify


def slow(pair: Path, depth: int, steps: int = 12, **changes: Any) -> dict[str, Any]:
    """Long enough to be interrupted in the middle: a slow teacher, a checkpoint every other step."""
    changes.setdefault("learner", {"steps": steps})
    return small_recipe(
        pair, schedule={"max_lag": depth}, teacher={"delay_ms": 10, "batch_samples": 4}, **changes
    )


def kill_tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL only the command; everything that it started must die on its own. Returns all of them."""
    family = [psutil.Process(process.pid), *descendants(process.pid)]
    process.kill()
    process.communicate()
    wait_for(lambda: gone(family), "the workers to die with their conductor", 5.0)
    return family


def shared_memory_left(family: list[psutil.Process]) -> list[str]:
    """Their files (torch_PID_...): a test beside this one has others."""
    pids = {process.pid for process in family}
    return [p.name for p in Path("/dev/shm").glob("torch_*") if int(p.name.split("_")[1]) in pids]


def same_run(run: Path, whole: Path) -> None:
    """They differ only in the clock."""
    assert metrics(run) == metrics(whole)
    assert lines(run / "ledger.jsonl") == lines(whole / "ledger.jsonl")
    assert check_accounts(run) == check_accounts(whole)
    same = ["steps", "score_last", "kl_last", "mean_freshness", "trained_tokens"]
    if not summary(whole)["prompts"][
        "refreshed"
    ]:  # of what a refresh drops some was generated already, as the clock had it
        same.append("generated_tokens")
    assert {k: summary(run)[k] for k in same} == {k: summary(whole)[k] for k in same}


EXACT: dict[str, dict[str, Any]] = {
    "max_lag 0": {"schedule": {"max_lag": 0}},
    # Groups of 3 in windows of 8: some are half done at any moment. Checkpoints fall between evaluations and
    # refreshes.
    "lag 2": {
        "schedule": {"lag": 2},
        "sampler": {"max_new_tokens": 10, "concurrency": 3},
        "eval": {"every": 5},
        "freshness": {"policy": "fixed_refresh", "refresh": {"every": 7}},
    },
}


@SLOW
@pytest.mark.parametrize("mode", EXACT)
def test_killed_and_resumed_is_bitwise_uninterrupted(fopd: Fopd, pair: Path, mode: str) -> None:
    """Killed twice at random moments, and stopped once by Ctrl-C."""
    short = slow(pair, 0, steps=24)
    recipe = {**short, **{k: {**short.get(k, {}), **v} for k, v in EXACT[mode].items()}}
    if mode != "max_lag 0":
        recipe["schedule"] = EXACT[mode]["schedule"]
    whole = fopd.run(recipe, "whole")
    rng = random.Random(11)
    process, run = start(fopd, recipe)
    wait_for(lambda: checkpoints(run), "a checkpoint")
    time.sleep(rng.uniform(0, 0.5))
    family = kill_tree(process)
    process = fopd.start("resume", run)
    reach(process, run, steps_done(run) + 2)
    time.sleep(rng.uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode in (0, 130)
    process = fopd.start("resume", run)
    wait_for(lambda: steps_done(run) > 16, "more steps")
    family += kill_tree(process)
    fopd("resume", run)
    same_run(run, whole)
    wait_for(lambda: not shared_memory_left(family), "shared memory to be given back", 5.0)


@SLOW
def test_killed_while_a_checkpoint_is_written(fopd: Fopd, pair: Path) -> None:
    """As soon as a save has begun, and a moment after: what has its name is whole, and is gone on from."""
    recipe = slow(pair, 0, checkpoint={"every": 1, "keep": 2})
    whole = fopd.run(recipe, "whole")
    process, run = start(fopd, recipe)
    for at, moment in ((3, 0.0), (6, 0.02), (9, 0.05)):
        begun = run / "checkpoints" / f"step-{at:06d}.tmp"
        deadline = time.monotonic() + 120
        while not begun.exists() and f"step-{at:06d}" not in checkpoints(run):
            assert process.poll() is None
            assert time.monotonic() < deadline
        time.sleep(moment)
        kill_tree(process)
        assert all(verify(run / "checkpoints" / name) is None for name in checkpoints(run))
        assert int(checkpoints(run)[-1][-6:]) >= at - 1, "the one before was complete when this one began"
        process = fopd.start("resume", run)
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0
    assert not list((run / "checkpoints").glob("*.tmp"))
    same_run(run, whole)


@SLOW
def test_checkpoints_of_a_fixed_lag_go_on_bitwise(fopd: Fopd, pair: Path) -> None:
    """Whatever the sampler was doing when they were written: at the start, in the middle, before the end."""
    recipe = small_recipe(
        pair,
        sampler={"max_new_tokens": 10, "concurrency": 3},
        learner={"steps": 9},
        eval={"every": 4},
        checkpoint={"every": 1, "keep": 100},
        teacher={"batch_samples": 3, "delay_ms": 5},
    )
    recipe["schedule"] = {"lag": 3}
    whole = fopd.run(recipe, "whole")
    for step in (1, 5, 8):
        again = shutil.copytree(whole, fopd.folder / f"again-{step}")
        fopd("resume", again, "--step", str(step))
        same_run(again, whole)


@SLOW
@pytest.mark.parametrize(("depth", "policy", "seed"), [(2, "fopd", 1), (3, "fixed_refresh", 2)])
def test_accounts_survive_kills_at_random_moments(
    fopd: Fopd, pair: Path, depth: int, policy: str, seed: int
) -> None:
    rng = random.Random(seed)
    fresh = {"policy": policy, "refresh": {"every": 4}}
    process, run = start(fopd, slow(pair, depth, freshness=fresh))
    wait_for(lambda: checkpoints(run), "a checkpoint")
    for _ in range(2):
        time.sleep(rng.uniform(0.0, 0.6))
        kill_tree(process)
        process = fopd.start("resume", run)
        reached = steps_done(run)
        wait_for(
            lambda reached=reached, process=process: steps_done(run) > reached or process.poll() is not None,
            "more steps",
        )
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0
    prompts = check_accounts(run)
    assert prompts["trained"] + prompts["gated"] == 12 * 8
    assert prompts["in_flight"] == 0
    steps = [r["step"] for r in metrics(run) if r["kind"] == "step"]
    assert steps == list(range(1, 13))
    assert summary(run)["max_lag"] <= depth


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=SLOW)])
def test_a_signal_to_all_writes_a_checkpoint_and_resume_goes_on(
    fopd: Fopd, pair: Path, number: signal.Signals
) -> None:
    """To the command and then to every process in its group, as `timeout` does; a terminal and SLURM do only
    the latter.
    """
    process, run = start(fopd, slow(pair, 2, steps=60, checkpoint={"every": 0}))
    reach(process, run, 3)
    family = descendants(process.pid)
    process.send_signal(number)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "fopd resume" in err
    wait_for(lambda: gone(family), "all that it started to end", 5.0)
    (name,) = checkpoints(run)
    assert int(name[-6:]) == steps_done(run)
    steps = int(name[-6:]) + 2
    fopd("resume", run, "--set", f"learner.steps={steps}")
    assert summary(run)["steps"] == steps
    check_accounts(run)


def test_ctrl_c_twice_stops_at_once(fopd: Fopd, pair: Path) -> None:
    """The running step never ends here, because the learner is stopped; the second Ctrl-C does not wait for
    it.
    """
    process, run = start(fopd, slow(pair, 2, steps=200))
    reach(process, run, 2)
    family = descendants(process.pid)
    worker(run, "learner-0", process.pid).suspend()
    time.sleep(1.0)  # the next step reaches it
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Traceback" not in err
    wait_for(lambda: gone(family), "all that it started to end", 5.0)


@SLOW
def test_ctrl_c_on_a_time_sliced_box(fopd: Fopd, pair: Path) -> None:
    process, run = start(
        fopd, slow(pair, 1, steps=60, placement={"mode": "timeslice"}, checkpoint={"every": 0})
    )
    reach(process, run, 2)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert checkpoints(run)
    fopd("resume", run, "--set", f"learner.steps={steps_done(run) + 2}")
    check_accounts(run)


def test_a_killed_learner_is_named_and_the_last_checkpoint_stands(fopd: Fopd, pair: Path) -> None:
    process, run = start(fopd, slow(pair, 1, steps=60))
    wait_for(lambda: checkpoints(run), "a checkpoint")
    family = descendants(process.pid)
    worker(run, "learner-0", process.pid).kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert "learner-0" in err
    assert "SIGKILL" in err
    wait_for(lambda: gone(family), "all that it started to end", 5.0)
    at = int(checkpoints(run)[-1][-6:])
    fopd("resume", run, "--set", f"learner.steps={at + 2}")
    check_accounts(run)


@pytest.mark.parametrize(
    "role", [pytest.param("sampler-0", marks=SLOW), "teacher-0", pytest.param("grader-0", marks=SLOW)]
)
def test_the_last_one_lost_ends_the_run_with_a_checkpoint(fopd: Fopd, pair: Path, role: str) -> None:
    process, run = start(fopd, slow(pair, 1, steps=60, runtime={"restarts": 0}, checkpoint={"every": 0}))
    reach(process, run, 2)
    family = descendants(process.pid)
    worker(run, role, process.pid).kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "Traceback" not in err
    assert role in err
    assert "SIGKILL" in err
    assert "fopd resume" in err
    wait_for(lambda: gone(family), "all that it started to end", 5.0)
    (name,) = checkpoints(run)
    assert int(name[-6:]) == steps_done(run)
    fopd("resume", run, "--set", f"learner.steps={steps_done(run) + 2}")
    check_accounts(run)


@SLOW
def test_a_lost_engine_is_replaced_and_nothing_changes(fopd: Fopd, pair: Path) -> None:
    """max_lag 0: sampler, teacher and grader are killed or stopped midway; the metrics are those of an
    undisturbed run.
    """
    quiet = fopd.run(slow(pair, 0), "quiet")
    process, run = start(fopd, slow(pair, 0, runtime={"timeout_s": 30.0}))
    for step, name, blow in ((2, "sampler-0", "kill"), (5, "grader-0", "kill"), (7, "teacher-0", "suspend")):
        reach(process, run, step)
        getattr(worker(run, name, process.pid), blow)()
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert summary(run)["restarts"] == 3
    for name in ("sampler-0", "grader-0", "teacher-0"):
        assert any(name in line and "restarting it (1 of 2)" in line for line in err.splitlines()), name
    assert "teacher-0" in next(line for line in err.splitlines() if "has not moved" in line)
    assert metrics(run) == metrics(quiet)
    assert check_accounts(run) == check_accounts(quiet)


@SLOW
def test_other_replicas_take_over(fopd: Fopd, pair: Path) -> None:
    """One of two samplers dies for good; the other does its work, and every sample is accounted for."""
    recipe = slow(pair, 2, steps=24, placement={"sampler": 2}, runtime={"restarts": 0})
    process, run = start(fopd, recipe)
    reach(process, run, 3)
    worker(run, "sampler-1", process.pid).kill()
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert "not restarting it" in err
    prompts = check_accounts(run)
    assert prompts["trained"] + prompts["gated"] == 24 * 8
    assert prompts["in_flight"] == 0
    assert summary(run)["max_lag"] <= 2


@SLOW
@pytest.mark.parametrize("role", ["sampler-0", "teacher-0"])
def test_an_engine_lost_on_a_time_sliced_box(fopd: Fopd, pair: Path, role: str) -> None:
    """At work, asleep, or during a change of turns (stopped first, so that the others wait for it to
    wake).
    """
    recipe = slow(pair, 1, steps=16, placement={"mode": "timeslice"}, runtime={"restarts": 4})
    process, run = start(fopd, recipe)
    engine = None
    for step, stopped_s in ((2, 0.0), (4, 2.0), (6, 2.0), (8, 0.0)):
        reach(process, run, step)
        engine = worker(run, role, process.pid, before=engine)
        engine.suspend()
        time.sleep(stopped_s)
        engine.kill()
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    assert summary(run)["restarts"] == 4
    check_accounts(run)


@SLOW
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair, learner={"steps": 4}))
    assert checkpoints(run) == ["step-000002", "step-000004"]
    shard = next((run / "checkpoints" / "step-000004" / "learner").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "bytes, its manifest says" in fopd("resume", run, "--step", "4", code=2).err
    expected = metrics(run)
    done = fopd("resume", run)
    assert str(shard) in done.err
    assert "falling back to step 2" in done.err
    assert metrics(run) == expected
    for step in ("step-000002", "step-000004"):
        (run / "checkpoints" / step / "state.json").write_text("{}")
    assert "no complete checkpoint" in fopd("resume", run, code=2).err


@SLOW
def test_a_checkpoint_of_another_recipe_is_refused(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair))
    err = fopd("resume", run, "--set", "task.horizon=3", "--set", "learner.steps=9", code=2).err
    assert "another recipe (task.horizon differ)" in err
    assert "fewer" in (e := fopd("resume", run, "--set", "learner.steps=2", code=2).err) or "less than" in e
    assert "no checkpoint of step 3" in fopd("resume", run, "--step", "3", code=2).err
    fopd("resume", run, "--set", "learner.steps=6")
    assert summary(run)["steps"] == 6
    check_accounts(run)


def test_a_run_directory_in_use_is_refused(fopd: Fopd, pair: Path) -> None:
    process, run = start(fopd, slow(pair, 0, steps=200))
    wait_for(lambda: checkpoints(run), "a checkpoint")
    err = fopd("resume", run, code=2).err
    assert f"live process {process.pid}" in err
    kill_tree(process)


@contextlib.contextmanager
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root, and a machine that lets it mount a small file system")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def fill(disk: Path, process: subprocess.Popen[str], until: Sequence[str] = ()) -> str:
    """Keep a file system full to the last byte, whatever the process writes and removes there meanwhile. Ends
    with the process, or when it has said all of `until`. Returns what it has said.
    """
    assert process.stderr is not None
    patience, said = time.monotonic() + RUN_TIMEOUT_S, ""
    with (disk / "ballast").open("wb") as ballast:
        while process.poll() is None and not (until and all(part in said for part in until)):
            assert time.monotonic() < patience, f"the run does not end; it said: {said}"
            size, free = os.fstat(ballast.fileno()).st_size, shutil.disk_usage(disk).free
            if free:
                with contextlib.suppress(OSError):  # the process was quicker: it has taken some of that
                    os.posix_fallocate(ballast.fileno(), size, free)
            if select.select([process.stderr], [], [], 0.02)[0]:
                said += os.read(process.stderr.fileno(), 1 << 16).decode(errors="replace")
    return said


@SLOW
def test_a_full_disk_loses_nothing(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    """A run directory on a file system that fills up to the last byte: training goes on with a warning; only
    the last save must succeed.
    """
    with small_disk(tmp_path) as disk:
        recipe = fopd.recipe(slow(pair, 1, steps=10, checkpoint={"every": 2, "keep": 1}))
        process = fopd.start("run", recipe, "--run-dir", disk / "run")
        wait_for(lambda: checkpoints(disk / "run"), "a checkpoint")
        err = fill(disk, process) + process.communicate()[1]
        assert process.returncode == 2, err
        assert "NO CHECKPOINT was written" in err
        assert "records wait in memory" in err
        assert "No space left" in err
        assert "Traceback" not in err
        assert "0.00 GB free, checkpoints need" in fopd("resume", disk / "run", code=2).err
        pair_of_models = ["--student", pair / "student", "--teacher", pair / "teacher"]
        (tmp_path / "questions.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n' * 20)
        new = fopd("new", disk / "new", *pair_of_models, "--data", tmp_path / "questions.jsonl", code=2).err
        assert new.splitlines()[-1].startswith("error: [Errno 28] No space left on device"), new
        assert not list((disk / "new").glob("*"))
        stands = checkpoints(disk / "run")
        (disk / "ballast").unlink()
        assert len(stands) == 1
        fopd("resume", disk / "run")
        assert summary(disk / "run")["steps"] == 10
        check_accounts(disk / "run")


@SLOW
def test_a_disk_that_was_full_for_a_while_cost_nothing(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        recipe = fopd.recipe(slow(pair, 1, steps=30, checkpoint={"every": 2, "keep": 1}))
        process = fopd.start("run", recipe, "--run-dir", disk / "run")
        wait_for(lambda: checkpoints(disk / "run"), "a checkpoint")
        err = fill(disk, process, until=["NO CHECKPOINT was written", "records wait in memory"])
        (disk / "ballast").unlink()
        err += process.communicate(timeout=RUN_TIMEOUT_S)[1]
        assert process.returncode == 0, err
        assert "the disk takes records again; none is lost" in err
        steps = [m["step"] for m in metrics(disk / "run") if m["kind"] == "step"]
        assert steps == list(range(1, 31)), err
        json.loads((disk / "run" / "trace.json").read_text())
        check_accounts(disk / "run")


@SLOW
def test_metrics_survive_a_line_cut_short(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair))
    expected = metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    fopd("resume", run, "--step", "2")
    assert metrics(run) == expected
    redone = [
        json.loads(line)["step"] for line in (run / "metrics.superseded.jsonl").read_text().splitlines()
    ]
    assert redone == [3, 4, 4]


def test_python_dash_m_is_the_same_command() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "fopd_cli", "--version"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip()
