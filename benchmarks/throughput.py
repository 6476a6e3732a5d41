#!/usr/bin/env python3
"""How close runs come to their slowest stage alone: wall time of real runs, with all their processes.

    python benchmarks/throughput.py [--quick] [--rounds 3] [--seconds 300] [--only WORD ...]
        [--pair recipes/real-pair] [--threads N] [--out docs/throughput/results.jsonl]
        [--report] [--into docs/throughput.md]

In every round, each stage is measured by itself (`throughput_alone.py`: the sampler on the same prompts, the
teacher on its rollouts, the learner on batches of them), and then one run follows another: each depth, each
policy. Every stage has its own fixed share of the cores, alone and in a run. The bound is the slowest stage
alone. Speed is that of the optimizer steps between warm-up and the last `max_lag` ones, for which nothing new
is sampled; batches that were in the buffer before and not after do not count.

What matters most comes first, and rows that are there are not measured again, so that a benchmark which was
stopped goes on, and `--seconds` fits it into a time. Another machine wants another `--out`. `--report` only
prints the tables of a results file; `--into` puts them into a page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import throughput_report as report
import throughput_trace as trace

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "throughput" / "results.jsonl"
FILLS = 3  # steps of warm-up, and as many as the largest lag
HELD_OUT = 8
COMMON = (
    "placement.mode=cpu",
    f"task.eval_prompts={HELD_OUT}",
    "checkpoint.every=0",
    "checkpoint.minutes=0",
    "track=[]",
    "learner.warmup_steps=0",
    "learner.decay=constant",
)
CONTROLLED = "fopd"
POLICIES = {
    "async": ("freshness.policy=async",),
    CONTROLLED: ("freshness.policy=fopd",),
    # Admission control gives up overlap on purpose where samples drift; without it the rest can be seen.
    "fopd, max_drift null": ("freshness.policy=fopd", "freshness.max_drift=null"),
}
STILL = "learner.lr=1.0e-9"  # responses keep their lengths while the learner works as ever


@dataclass(frozen=True)
class Workload:
    """What is trained on what. `teacher`: how many times as long as the slower of the other two stages the
    teacher takes, by a delay that is found out first; None: no delay. `steps`: measured, relative to others.
    """

    name: str
    recipe: str
    settings: tuple[str, ...]
    teacher: float | None = None
    steps: float = 1.0


TINY = "recipes/quickstart.yaml"
# Most samples babble: a quarter are below 41 tokens, half below 74, a quarter above 176.
UNEVEN = ("sampler.temperature=2.5", "sampler.max_new_tokens=320", "schedule.inflight=keep", STILL)
TOOLS = ("learner.batch_samples=16", "sampler.concurrency=16", STILL)
TINY_WORKLOADS = (
    Workload("balanced", TINY, (), teacher=1.0),
    Workload("uneven lengths", TINY, UNEVEN, teacher=1.0, steps=0.5),
    Workload("slow teacher", TINY, (), teacher=3.0),
    Workload("tools", "recipes/tool-tiny.yaml", TOOLS, steps=0.25),
)


def pair_workloads(pair: Path) -> tuple[Workload, ...]:
    """Of a real pair (scripts/make_real_pair), as recipes/real-cpu.yaml trains it."""
    own = (f"student.model={pair / 'student'}", f"teacher.model={pair / 'teacher'}", STILL)
    return (Workload(f"pair {pair.name}", "recipes/real-cpu.yaml", own, steps=0.25),)


@dataclass(frozen=True)
class Cell:
    """One run, or, without a policy, the stages alone."""

    workload: Workload
    round: int
    depth: int = 0
    policy: str | None = None

    @property
    def key(self) -> str:
        what = "alone" if self.policy is None else f"max_lag {self.depth}/{self.policy}"
        return f"{self.workload.name}/{what}/{self.round}"


# (depths, policies) in the order in which they matter
FIRST = ((0, 2, 8), tuple(POLICIES))
REST = ((1, 4), ("async", "fopd, max_drift null"))
QUICK = ((0, 2), ("async", "fopd, max_drift null"))


def cells(workloads: tuple[Workload, ...], rounds: int, quick: bool) -> Iterator[Cell]:
    """Workload by workload, and round by round within one: what is compared is measured close together."""
    for depths, policies in (QUICK,) if quick else (FIRST, REST):
        for workload in workloads[: 1 if quick else None]:
            for number in range(rounds):
                yield Cell(workload, number)
                yield from _race(workload, number, depths, policies)


def _race(workload: Workload, number: int, depths: tuple[int, ...], policies: tuple[str, ...]) -> list[Cell]:
    """One round's runs, in the other order every second time. At max_lag 0 no sample is late, so one policy
    stands for all; where the student stays as it is, nothing drifts, and admission control does nothing.
    """
    chosen = [p for p in policies if p != CONTROLLED or STILL not in workload.settings]
    found = [
        Cell(workload, number, depth, policy)
        for depth in depths
        for policy in (chosen if depth else chosen[:1])
    ]
    return found if number % 2 == 0 else found[::-1]


# ---- measuring ---------------------------------------------------------------------------------------------


class Bench:
    """Measures cells, with `threads` cores for each stage."""

    def __init__(self, steps: int, threads: int, known: dict[str, Any], folder: Path) -> None:
        self.steps, self.threads, self.folder = steps, threads, folder
        self.known = known  # results by key
        self.number = 0

    def measure(self, cell: Cell) -> Iterator[dict[str, Any]]:
        """The cell's row, and before it that of what had to be found out first."""
        delay = 0.0
        if cell.workload.teacher is not None:
            key = f"{cell.workload.name}/delay"
            if key not in self.known:
                yield self._row(key, cell.workload, {"kind": "delay", "delay_ms": self._delay(cell.workload)})
            delay = float(self.known[key]["delay_ms"])
        began, load = time.time(), os.getloadavg()[0]
        found = self._alone(cell, delay) if cell.policy is None else self._run(cell, delay)
        yield self._row(
            cell.key,
            cell.workload,
            {
                **found,
                "round": cell.round,
                "delay_ms": delay,
                "load_before": load,
                "took": time.time() - began,
            },
        )

    def _row(self, key: str, workload: Workload, found: dict[str, Any]) -> dict[str, Any]:
        """With what the figures depend on."""
        import torch
        import transformers

        row = {
            "key": key,
            "workload": workload.name,
            **found,
            "cores": len(os.sched_getaffinity(0)),
            "threads": self.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.known[key] = row
        return row

    def _measured_steps(self, workload: Workload) -> int:
        return max(4, round(self.steps * workload.steps))

    def _settings(self, workload: Workload, delay: float) -> list[str]:
        share = ", ".join(f"{stage}: {self.threads}" for stage in trace.STAGES)
        return [*COMMON, f"placement.threads={{{share}}}", f"teacher.delay_ms={delay}", *workload.settings]

    def _delay(self, workload: Workload) -> float:
        """Milliseconds per sample that make the teacher as slow as it should be."""
        assert workload.teacher is not None
        found = self._stages(workload, 0.0)
        slowest = max(found.sampler, found.learner)
        missing = workload.teacher * slowest - found.teacher
        return round(max(0.0, 1e3 * missing / self._batch(workload)), 3)

    def _batch(self, workload: Workload) -> int:
        return int(self._recipe(workload, 0.0).learner.batch_samples)

    def _recipe(self, workload: Workload, delay: float, *settings: str) -> Any:
        from fopd_cli.recipe import load_recipe

        return load_recipe(ROOT / workload.recipe, [*self._settings(workload, delay), *settings])

    def _stages(self, workload: Workload, delay: float) -> Any:
        from throughput_alone import RECORDED, alone

        recipe = self._recipe(workload, delay, "freshness.policy=async", f"schedule.max_lag={RECORDED}")
        with self._quiet() as folder:
            return alone(recipe, self._measured_steps(workload), folder)

    def _alone(self, cell: Cell, delay: float) -> dict[str, Any]:
        found = asdict(self._stages(cell.workload, delay))
        tokens = found.pop("response_tokens")
        return {"kind": "alone", "seconds": found, "bound": max(found.values()), "response_tokens": tokens}

    def _run(self, cell: Cell, delay: float) -> dict[str, Any]:
        from fopd_cli import launch

        assert cell.policy is not None
        steps, first = self._measured_steps(cell.workload), cell.depth + FILLS
        recipe = self._recipe(
            cell.workload,
            delay,
            *POLICIES[cell.policy],
            f"schedule.max_lag={cell.depth}",
            f"learner.steps={first + steps + cell.depth}",
        )
        with self._quiet() as folder:
            launch.run(recipe, folder / "run")
            return {
                "kind": "run",
                "depth": cell.depth,
                "policy": cell.policy,
                **of_run(folder / "run", first, steps, recipe.learner.batch_samples),
            }

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[Path]:
        """A new folder, in which what is said to people goes into a file."""
        self.number += 1
        folder = self.folder / str(self.number)
        folder.mkdir()
        with (folder / "said.txt").open("w") as said, contextlib.redirect_stderr(said):
            yield folder


def of_run(run: Path, first: int, steps: int, batch: int) -> dict[str, Any]:
    """What a finished run says of itself between the ends of optimizer step `first` (1-based) and of the
    one that is `steps` later.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r for r in rows if r["kind"] == "step"}
    inside = [by_step[step] for step in range(first + 1, first + steps + 1)]
    found = trace.timeline(run)
    within = trace.window(found, first, steps)
    buffered = (inside[-1]["timing"]["buffer_samples"] - by_step[first]["timing"]["buffer_samples"]) / batch
    used_up = max(0.0, -buffered, -trace.drawn_down(found, within, batch))
    again = any(r["timing"]["replayed"] for r in inside) or any(r["kind"] == "refresh" for r in rows)
    return {
        "steps": steps,
        "seconds": within.seconds / (steps - used_up),
        "used_up": used_up,
        "conductor": sum(r["timing"]["conductor_seconds"] for r in inside) / within.seconds,
        "shares": trace.shares(found, within),
        "sampler_waits": trace.per_step(trace.sampler_waits(found, within), within),
        "learner_waits": None
        if again
        else trace.per_step(trace.learner_waits(found, within, batch, HELD_OUT), within),
        "response_tokens": sum(r["response_length"] for r in inside) / steps,
        "lag_mean": sum(r["lag_mean"] for r in inside) / steps,
        "ahead": sum(r["timing"]["ahead"] for r in inside) / steps,
    }


# ---- the command -------------------------------------------------------------------------------------------


def fits(cell: Cell, results: dict[str, Any], left: float) -> bool:
    """Whether there is time for a cell, judging by the longest of its workload so far."""
    took = [r["took"] for r in results.values() if r["workload"] == cell.workload.name and "took" in r]
    return left > max(took, default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a minute: the first workload, few steps")
    parser.add_argument("--rounds", type=int, help="default 3; quick: 1")
    parser.add_argument("--steps", type=int, help="measured optimizer steps of a run; default 40, quick: 8")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing that takes longer")
    parser.add_argument("--only", nargs="*", help="cells whose keys contain one of these")
    parser.add_argument(
        "--pair", type=Path, help="a directory with student/ and teacher/, not the tiny pairs"
    )
    parser.add_argument("--threads", type=int, help="cores of each stage; default 1, with --pair a third")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="print the tables, measure nothing")
    parser.add_argument("--into", type=Path, help="a page whose tables these become")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = report.read(args.out)
    if not args.report:
        run_all(args, results)
    tables = report.markdown(list(results.values()))
    print(tables)
    if args.into is not None:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(report.filled(page, args.out.name, tables), encoding="utf-8")


def run_all(args: argparse.Namespace, results: dict[str, Any]) -> None:
    # Before torch is imported: no driver is touched, so workers can be forked.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Workers are forked from a server that is a Python of its own.
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    from fopd_cli.runtime.crew import warm

    warm.begin()
    began, cores = time.monotonic(), len(os.sched_getaffinity(0))
    workloads = TINY_WORKLOADS if args.pair is None else pair_workloads(args.pair.resolve())
    threads = args.threads or (1 if args.pair is None else max(1, (cores - 1) // len(trace.STAGES)))
    if cores <= threads * len(trace.STAGES):
        print(
            f"{cores} cores for three stages of {threads} and the conductor: a run may not reach the bound "
            "for want of cores alone",
            file=sys.stderr,
        )
    rounds, steps = args.rounds or (1 if args.quick else 3), args.steps or (8 if args.quick else 40)
    with tempfile.TemporaryDirectory() as scratch, args.out.open("a") as file:
        bench = Bench(steps, threads, results, Path(scratch))
        for cell in cells(workloads, rounds, args.quick):
            if cell.key in results or (args.only and not any(w in cell.key for w in args.only)):
                continue
            if not fits(cell, results, args.seconds - (time.monotonic() - began)):
                print("no time is left for more", file=sys.stderr)
                break
            for row in bench.measure(cell):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{time.monotonic() - began:5.0f} s  {report.line(row)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
