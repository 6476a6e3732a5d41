"""Shared fixtures: tiny real models, recipes that use them, and the real `fopd` command."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SLOW = pytest.mark.slow
TINY = ROOT / "recipes" / "tiny"
RUN_TIMEOUT_S = 600

sys.path.insert(0, str(ROOT / "scripts"))

# Beside another test an example may have to wait for the processor.
settings.register_profile("fopd", deadline=None)
settings.load_profile("fopd")

# Under nohup these tests ignore hangups, and so would every run that they start. A handler is not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Each of the processes that run tests side by side gets a folder of its own for temporary files: some
    tests look there for what was left behind. Open to all, as /tmp is: the sandbox's user passes.
    """
    folder = node.workerinput["scratch"] = tempfile.mkdtemp(prefix="fopd-tests-")
    os.chmod(folder, 0o1777)
    node.config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_configure(config: pytest.Config) -> None:
    if (told := getattr(config, "workerinput", None)) is not None:
        os.environ["TMPDIR"] = tempfile.tempdir = told["scratch"]


def make_pair(folder: Path, arch: str, *extra: str) -> Path:
    """An untrained teacher and student with one byte tokenizer."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "make_tiny_pair.py"),
        str(folder),
        "--arch",
        arch,
        "--untrained",
    ]
    subprocess.run([*command, *extra], check=True, capture_output=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("qwen3"), "qwen3", "--dtype", "float32")


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as the teacher, a student of some of its layers: half a minute to write."""
    folder = tmp_path_factory.mktemp("real") / "pair"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_real_pair.py", folder], check=True, cwd=ROOT)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_recipe(pair: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that runs in seconds; `changes` are sections to merge in."""
    recipe: dict[str, Any] = {
        "student": {"model": str(pair / "student")},
        "teacher": {"model": str(pair / "teacher"), "batch_samples": 4},
        "task": {"name": "arithmetic", "horizon": 2, "eval_prompts": 8},
        "sampler": {"max_new_tokens": 10, "concurrency": 8},
        "learner": {"steps": 4, "batch_samples": 8, "lr": 1e-3, "warmup_steps": 0},
        "schedule": {"max_lag": 0},
        # An untrained student at such a rate drifts by more than the default allows: what asks for a depth is
        # to get it.
        "freshness": {"max_drift": None},
        "checkpoint": {"every": 2},
    }
    for section, values in changes.items():
        if isinstance(values, dict):
            recipe[section] = {**recipe.get(section, {}), **values}
        else:
            recipe[section] = values
    return recipe


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Fopd:
    """The real command, in a scratch directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.started: list[subprocess.Popen[str]] = []

    def recipe(self, content: dict[str, Any], name: str = "recipe.yaml") -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, *args: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fopd_cli", *map(str, args)]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        """A test that failed half-way must not leave a run behind."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def __call__(self, *args: str | Path, code: int = 0, timeout: float = RUN_TIMEOUT_S) -> Done:
        """Run to the end and check the exit code."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == code, f"exit {process.returncode}, expected {code}\n{out}\n{err}"
        if code != 0:
            assert "Traceback" not in err, err
        return Done(process.returncode, out, err)

    def run(self, content: dict[str, Any], name: str = "run", *args: str) -> Path:
        """`fopd run` to the end; returns the run directory."""
        self("run", self.recipe(content, f"{name}.yaml"), "--run-dir", self.folder / name, *args)
        return self.folder / name


@pytest.fixture
def fopd(tmp_path: Path) -> Iterator[Fopd]:
    command = Fopd(tmp_path)
    yield command
    command.stop_all()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "timing"} for record in lines(run / "metrics.jsonl")]


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@contextlib.contextmanager
def full_at(nbytes: int) -> Iterator[None]:
    """No file of this process grows beyond this size meanwhile: as a full disk does, the system refuses what
    does not fit, and takes a part of what fits in part.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Poll until the condition is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"timed out waiting for {what}")


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    return sum('"kind": "step"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def reach(process: subprocess.Popen[str], run: Path, step: int, seconds: float = 120.0) -> None:
    """Wait until so many steps are done; a run that has ended fails with what it said."""
    wait_for(lambda: steps_done(run) >= step or process.poll() is not None, f"step {step}", seconds)
    if process.poll() is not None:
        pytest.fail(f"the run ended before step {step} with {process.returncode}: {process.communicate()[1]}")


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def check_accounts(run: Path) -> dict[str, Any]:
    """The summary adds up, and the ledger says the same sample by sample: none trained twice, none lost."""
    prompts = summary(run)["prompts"]
    assert (
        prompts["drawn"]
        == prompts["trained"] + prompts["gated"] + prompts["refreshed"] + prompts["in_flight"]
    )
    ledger = lines(run / "ledger.jsonl")
    for what in ("trained", "gated", "refreshed"):
        ids = [i for record in ledger for i in record.get(what, [])]
        assert len(ids) == prompts[what], what
    consumed = [i for record in ledger for i in [*record.get("trained", []), *record.get("gated", [])]]
    assert len(set(consumed)) == len(consumed)
    return prompts
