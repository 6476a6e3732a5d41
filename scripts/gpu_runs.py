"""Whole runs, for the report of `scripts/gpu`: how fast each role was, and how much memory all held."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROLES = {"sampler": "generate", "teacher": "score", "learner": "train"}  # with what each is there for
WATCH_S = 0.3  # between two looks at the memory


@dataclass(frozen=True)
class Run:
    """A run that has ended; `held` is the most bytes that its processes took together."""

    folder: Path
    held: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl of optimizer steps."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "step"]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))


def run(recipe: Path, folder: Path, keys: Sequence[str], device: str) -> Run:
    """`fopd run` to its end; its messages go to stderr. Raises RuntimeError with the last of them if it
    fails.
    """
    # TensorBoard may not be installed, and nothing here reads its files.
    sets = [part for key in ("track=[]", *keys) for part in ("--set", key)]
    command = [sys.executable, "-m", "fopd_cli", "run", str(recipe), "--run-dir", str(folder), *sets]
    with (folder.parent / f"{folder.name}.log").open("w") as said:
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True, cwd=ROOT)
        with Watch(running.pid, device) as watch:
            running.wait()
    told = Path(said.name).read_text()
    sys.stderr.write(told)
    if running.returncode:
        raise RuntimeError((told.strip().splitlines() or ["the run said nothing"])[-1])
    return Run(folder, watch.most)


class Watch:
    """The most bytes that a process and its descendants hold, looked at again and again by a thread: on CUDA
    what the first device has given out since the start, contexts and libraries included; on a CPU resident
    memory, where a page that several share counts once.
    """

    def __init__(self, pid: int, device: str) -> None:
        self.pid, self.cuda, self.most = pid, device == "cuda", 0

    def __enter__(self) -> Watch:
        self._before = _given_out() if self.cuda else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(WATCH_S):
            held = _given_out() - self._before if self.cuda else _resident(self.pid)
            self.most = max(self.most, held)


def _given_out() -> int:
    import torch

    free, total = torch.cuda.mem_get_info(0)
    return total - free


def _resident(pid: int) -> int:
    import psutil

    held = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(pid)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                held += process.memory_full_info().pss
    return held


# ---- speed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a role did after the first step, over all of its workers."""

    tokens: int
    busy: float  # seconds
    window: float  # seconds from the end of the first step to the end of the last


def work(folder: Path) -> dict[str, Work]:
    """By role, from the run's trace.json. The first step loads and compiles, so it counts only if there is no
    other. A sampler's tokens are those of finished responses, the others' are those of whole samples.
    """
    from fopd_cli.runtime.journal.trace import read_trace

    events = read_trace((folder / "trace.json").read_text(encoding="utf-8"))
    tracks = {e["tid"]: e["args"]["name"] for e in events if e.get("ph") == "M"}
    spans = [(tracks[e["tid"]].split("-")[0], e) for e in events if e.get("ph") == "X"]
    ends = sorted(e["ts"] + e["dur"] for _, e in spans if e["name"] == "train")
    first = ends[0] if len(ends) > 1 else min(e["ts"] for _, e in spans)
    found = {}
    for role, name in ROLES.items():
        counted = [e for r, e in spans if r == role and e["name"] == name and e["ts"] + e["dur"] > first]
        tokens = sum(e["args"]["tokens"] for e in counted)
        found[role] = Work(tokens, sum(e["dur"] for e in counted) / 1e6, (ends[-1] - first) / 1e6)
    return found


def speeds(folder: Path) -> Iterator[str]:
    """Tokens per second of each role, as a table."""
    yield "| role, after the first step | tokens | busy s | tokens/s while busy | tokens/s of the run |"
    yield "|---|---|---|---|---|"
    for role, done in work(folder).items():
        busy, all_in_all = (done.tokens / max(s, 1e-9) for s in (done.busy, done.window))
        yield f"| {role} | {done.tokens:,} | {done.busy:.2f} | {busy:,.0f} | {all_in_all:,.0f} |"


# ---- memory ------------------------------------------------------------------------------------------------


def by_arithmetic(folder: Path, device: str) -> tuple[int, str]:
    """What the memory model says of a run: the bytes that its first device holds at most (on a CPU, all
    processes), and the largest parts.
    """
    from fopd_cli.inputs import load_inputs
    from fopd_cli.plan.calibrate import placement
    from fopd_cli.recipe import load_recipe
    from fopd_cli.runtime import devices, placing
    from fopd_cli.runtime.memory import model as memory
    from fopd_cli.runtime.memory.sizes import arena_bytes
    from fopd_cli.runtime.scheduling.prompts import context_tokens
    from fopd_cli.runtime.weights.choice import host_bytes

    recipe, (plan, _) = load_recipe(folder / "recipe.yaml"), placement(folder)
    inputs = load_inputs(recipe, plan)
    recipe = inputs.recipe
    response = max(recipe.sampler.max_new_tokens, recipe.eval.max_new_tokens or 0)
    asked, told = (context_tokens(recipe, inputs.stream, judged=j) - response for j in (False, True))
    known = placing.models(recipe, asked, told)
    room = (devices.memory(0) if device == "cuda" else None) or 80 * memory.GB
    found = memory.workers(recipe, plan, known, room)
    if device == "cuda":
        parts = memory.demands(plan, found)[0].parts
    else:
        shared = arena_bytes(recipe, inputs.target_specs) + host_bytes(recipe, inputs.published)
        parts = memory.host(plan, found, shared)
    return memory.total(parts), memory.largest(parts)


def memory_line(ran: Run, device: str) -> str:
    """What all roles held together, beside what the memory model says."""
    needed, parts = by_arithmetic(ran.folder, device)
    where = "The device" if device == "cuda" else "All processes"
    return (
        f"{where} held at most {ran.held / 1e9:.2f} GB, contexts and libraries included; the memory model "
        f"says {needed / 1e9:.2f} GB at the worst moment ({parts})."
    )
