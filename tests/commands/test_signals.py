"""Signals in every phase of a command, sent to all its processes at once, as `timeout`, systemd and SLURM
do.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    ROOT,
    RUN_TIMEOUT_S,
    SLOW,
    Fopd,
    descendants,
    lines,
    metrics,
    reach,
    small_recipe,
    steps_done,
    wait_for,
)
from run_kit import checkpoints, gone, start

from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec
from fopd_cli.runtime.crew.messages import Ready, StopCommand
from fopd_cli.runtime.crew.warm import STOPPING


def end(process: subprocess.Popen[str], family: list[psutil.Process]) -> str:
    """Check that it ends as after Ctrl-C and leaves nothing behind; returns its output."""
    _, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    wait_for(lambda: gone(family), "all that it started to end", 10.0)
    return err


def catches(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_while_workers_start(fopd: Fopd, pair: Path) -> None:
    """They start with the signal blocked, so none is killed in the seconds before it can ignore it."""
    process, run = start(fopd, small_recipe(pair))
    wait_for(lambda: (run / "logs").is_dir() and len(descendants(process.pid)) > 2, "the first workers")
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped before the first step" in end(process, family)


def test_before_there_is_anything_to_save(fopd: Fopd, pair: Path) -> None:
    process = fopd.start("doctor", fopd.recipe(small_recipe(pair)))
    wait_for(lambda: catches(process.pid, signal.SIGTERM), "the command, which then imports for seconds")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["code in a string", "an import that lets nothing out"])
def test_wherever_python_is(tmp_path: Path, place: str) -> None:
    """Python kills itself after a KeyboardInterrupt in the former; torch's C++ aborts, or goes on, after one
    in the latter.
    """
    kill = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    (tmp_path / "swallows.py").write_text(f"try:\n    {kill}\nexcept BaseException:\n    pass\n")
    does = {
        "code in a string": f"exec({kill!r})",
        "an import that lets nothing out": "__import__('swallows')",
    }[place]
    (tmp_path / "command.py").write_text(
        f"import fopd_cli.cli as cli\ncli.app = lambda **_: {does}\ncli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-m", "command"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@SLOW
def test_during_an_evaluation(fopd: Fopd, pair: Path) -> None:
    """It is redone after the resume, and the rest is what it would have been."""
    recipe = small_recipe(
        pair,
        task={"name": "arithmetic", "horizon": 2, "eval_prompts": 24},
        sampler={"max_new_tokens": 60, "concurrency": 4},
        teacher={"delay_ms": 100, "batch_samples": 4},
        learner={"steps": 2},
    )
    whole = fopd.run(recipe, "whole")
    process, run = start(fopd, recipe)
    wait_for(
        lambda: "generate" in (run / "trace.json").read_text() if (run / "trace.json").exists() else False,
        "samples",
    )
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    end(process, family)
    assert checkpoints(run) == ["step-000000"]
    assert lines(run / "metrics.jsonl") == []
    fopd("resume", run)
    assert metrics(run) == metrics(whole)


@SLOW
def test_a_terminal_that_closes(fopd: Fopd, pair: Path) -> None:
    """SIGHUP, after which nothing can be printed: there is still a checkpoint."""
    run, recipe = (
        fopd.folder / "run",
        fopd.recipe(small_recipe(pair, learner={"steps": 200}, checkpoint={"every": 0})),
    )
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "fopd_cli", "run", str(recipe), "--run-dir", str(run)]
    wrapped = ["setsid", "--ctty", "--wait", *command]
    process = subprocess.Popen(
        wrapped, stdin=other, stdout=other, stderr=other, env=fopd.environment, cwd=fopd.folder, text=True
    )
    os.close(other)
    reach(process, run, 2)
    family = [psutil.Process(process.pid), *descendants(process.pid)]
    os.close(terminal)
    wait_for(lambda: gone(family), "the command to end")
    assert len(checkpoints(run)) == 1
    process.wait()


@SLOW
def test_with_nohup_a_terminal_that_closes_is_nothing(fopd: Fopd, pair: Path) -> None:
    run, recipe = fopd.folder / "run", fopd.recipe(small_recipe(pair, learner={"steps": 6}))
    command = ["nohup", sys.executable, "-m", "fopd_cli", "run", str(recipe), "--run-dir", str(run)]
    process = subprocess.Popen(
        command,
        env=fopd.environment,
        cwd=fopd.folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    reach(process, run, 1)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0


@SLOW
def test_during_an_evaluation_of_its_own(fopd: Fopd, pair: Path) -> None:
    """Finished rows are kept; the same command continues to the same figures."""
    recipe = fopd.recipe(
        small_recipe(
            pair,
            task={"name": "arithmetic", "horizon": 2, "eval_prompts": 80},
            sampler={"max_new_tokens": 60, "concurrency": 4},
        )
    )
    arguments: list[Any] = ["eval", pair / "student", "--task", recipe, "--jobs", 2, "--out"]
    process = fopd.start(*arguments, "rows.jsonl")
    rows = fopd.folder / "rows.jsonl"
    wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) > 3, "rows")
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGTERM)
    end(process, family)
    assert 2 < len(rows.read_text().splitlines()) < 81
    fopd(*arguments, "rows.jsonl")
    fopd(*arguments, "others.jsonl")
    assert lines(rows) == lines(fopd.folder / "others.jsonl")


@SLOW
def test_two_signals_a_moment_apart_stop_at_once(fopd: Fopd, pair: Path) -> None:
    """The second may also go to all processes; the running step never ends, because the learner is
    stopped.
    """
    process, run = start(fopd, small_recipe(pair, learner={"steps": 500}))
    reach(process, run, 1)
    family = descendants(process.pid)
    log = str(run / "logs" / "learner-0.log")
    learner = next(p for p in family if os.path.realpath(f"/proc/{p.pid}/fd/1") == log)
    learner.suspend()
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    assert "stopped immediately" in end(process, family)


@SLOW
def test_tools_that_are_killed_with_it_leave_no_trace(fopd: Fopd) -> None:
    """systemd also sends SIGTERM to sandboxes. Their output after it must not become part of an episode."""
    content = {
        "student": {"model": str(ROOT / "recipes/tiny-tool/student")},
        "teacher": {"model": str(ROOT / "recipes/tiny-tool/teacher")},
        "task": {"name": "tool", "digits": 2, "terms": 3, "train_prompts": 100, "eval_prompts": 4},
        "sampler": {"max_new_tokens": 100, "concurrency": 8},
        "learner": {"steps": 5, "batch_samples": 8, "lr": 1e-3},
        "schedule": {"max_lag": 0},
        "checkpoint": {"every": 1},
    }
    whole = fopd.run(content, "whole")
    process, run = start(fopd, content)
    for _ in range(2):
        reach(process, run, steps_done(run) + 1)
        family = descendants(process.pid)
        for one in [psutil.Process(process.pid), *family]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a sandbox dies with its parent
                one.send_signal(signal.SIGTERM)
        end(process, family)
        process = fopd.start("resume", run)
    process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0
    assert metrics(run) == metrics(whole)


def sleeper(spec: WorkerSpec, mailbox: Mailbox) -> None:
    """Starts a program, as graders do; reports how it ended after all signals have passed."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    mailbox.send(Ready({"child": child.pid}))
    while not isinstance(mailbox.receive(block=True), StopCommand):
        mailbox.send(child.wait())


@pytest.mark.parametrize(("role", "dies"), [("environment", True), ("learner", False)])
def test_workers_leave_signals_alone_and_what_they_start_knows_them(
    tmp_path: Path, role: str, dies: bool
) -> None:
    """Programs that workers start get the usual signal handling, so `timeout` works in a sandbox."""
    with Fleet(tmp_path, 60, 60) as fleet:
        worker = fleet.start(WorkerSpec(role, 0, 1, (), 1), sleeper)
        for number in STOPPING:  # while it is being born
            os.kill(worker.process.pid, number)
        ((_, ready),) = wait_for(lambda: fleet.receive(timeout=0.5), "the worker")
        child = psutil.Process(ready.info["child"])
        for number in STOPPING:
            os.kill(worker.process.pid, number)
            if not dies:
                child.send_signal(number)
        time.sleep(0.5)
        assert worker.process.is_alive()
        assert child.is_running()
        child.send_signal(signal.SIGTERM if dies else signal.SIGKILL)
        fleet.send(worker.name, "how did it end?")
        ((_, code),) = wait_for(lambda: fleet.receive(timeout=0.5), "an answer")
        assert code == -(signal.SIGTERM if dies else signal.SIGKILL)
