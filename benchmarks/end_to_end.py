#!/usr/bin/env python3
"""Seconds to reach a quality: fopd at several depths and with both samplers against a plain loop and TRL, on
one pair.

    python benchmarks/end_to_end.py [--pair recipes/real-pair] [--questions recipes/questions.jsonl]
        [--steps 20] [--to 0.63] [--only NAME ...] [--repeats 1] [--out runs/end-to-end.jsonl]

Contenders run one after another, each with the machine to itself, on the same pair, questions, batch,
lengths, learning rate, AdamW (no clipping, no weight decay but TRL's and PyTorch's defaults) and loss:
reverse KL over the vocabulary, the mean over tokens. Reported are the seconds of training until the KL to the
teacher on held-out questions is down to `--to` (between two evaluations: along the line of log KL), seconds
per step, answer tokens per second, and the last KL. Starting and evaluating are not counted for any
contender. `--pair tiny` takes the shipped tiny pair and arithmetic: seconds instead of minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from plain_loop import HELD_OUT

ROOT = Path(__file__).resolve().parent.parent
MAX_LAGS = (0, 1, 2, 4)


@dataclass
class Curve:
    """A contender's result: seconds of training at the end of each step, and (seconds, KL) of each
    evaluation.
    """

    steps: list[float] = field(default_factory=list)
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    tokens: int = 0

    def seconds_to(self, kl: float) -> float:
        """Seconds until the held-out KL was down to this; infinite if never."""
        for (t0, k0), (t1, k1) in pairwise(self.evaluations):
            if k1 <= kl < k0:
                return t0 + (t1 - t0) * (math.log(k0) - math.log(kl)) / (math.log(k0) - math.log(k1))
        return math.inf

    @property
    def a_step(self) -> float:
        return self.steps[-1] / len(self.steps)


def of_a_loop(script: str, args: argparse.Namespace) -> Curve:
    """The curve of plain_loop.py or trl_loop.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), str(args.pair), str(args.questions)]
    for name in ("steps", "batch", "tokens", "lr", "every", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    curve = Curve()
    for row in map(json.loads, filter(lambda line: line.startswith('{"'), done.stdout.splitlines())):
        if row["kind"] == "eval":
            curve.evaluations.append((row["seconds"], row["kl"]))
        else:
            curve.steps.append(row["seconds"])
            curve.tokens += row.get("tokens", 0)
    return curve


def of_fopd(max_lag: int, policy: str, engine: str, args: argparse.Namespace) -> Curve:
    """The curve of `fopd run`, from what it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, run = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(json.dumps(fopd_recipe(max_lag, policy, engine, args)))
        command = [sys.executable, "-m", "fopd_cli", "run", str(recipe), "--run-dir", str(run)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve, evaluating, began = Curve(), 0.0, 0.0
    for row in rows:
        timing = row["timing"]
        if row["kind"] == "eval":
            if row["step"] == 0:
                began = timing["wall_seconds"]
            else:
                evaluating += timing["seconds"]
            at = curve.steps[-1] if curve.steps else 0.0
            curve.evaluations.append((at, row["kl"]))
        elif row["kind"] == "step":
            curve.steps.append(timing["wall_seconds"] - began - evaluating)
            curve.tokens += round(row["response_length"] * args.batch)
    return curve


def fopd_recipe(max_lag: int, policy: str, engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """Keys that all contenders share have the same values; the rest is fopd's default."""
    file, vllm = str(args.questions.resolve()), engine == "vllm"
    return {
        "student": {"model": str(args.pair.resolve() / "student")},
        "teacher": {"model": str(args.pair.resolve() / "teacher"), "dtype": "bf16"},
        "task": {"name": "math", "train": file, "eval": file, "eval_prompts": HELD_OUT, "answer": None},
        "sampler": {
            "engine": engine,
            "max_new_tokens": args.tokens,
            "concurrency": args.concurrency,
            "dtype": "bf16",
        },
        "learner": {
            "steps": args.steps,
            "batch_samples": args.batch,
            "lr": args.lr,
            "warmup_steps": 0,
            "dtype": "bf16",
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "clip": 0.0,
        },
        "loss": {"kind": "reverse_kl", "support": "full", "average": "token"},
        "schedule": {"max_lag": max_lag, "inflight": "keep" if vllm else "wait"},
        "freshness": {"policy": policy},
        "eval": {"every": args.every, "training": False},
        "checkpoint": {"every": 0},
        "placement": {"mode": args.mode},
        "seed": args.seed,
    }


def tiny(args: argparse.Namespace, folder: Path) -> None:
    """The shipped pair, and its task's questions in a file."""
    from fopd_cli.tasks import load_task

    keys = {"horizon": 5, "difficulty": 2, "train_prompts": 2000, "eval_prompts": HELD_OUT}
    task = load_task("arithmetic", keys)
    asked = [str(p.text) for split in ("eval", "train") for p in task.prompts(split)]
    args.pair, args.questions = ROOT / "recipes" / "tiny", folder / "questions.jsonl"
    args.questions.write_text("".join(json.dumps({"question": q}) + "\n" for q in asked))


def contenders(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "plain loop": lambda: of_a_loop("plain_loop.py", args),
        "TRL DistillationTrainer": lambda: of_a_loop("trl_loop.py", args),
    }
    for engine in ("transformers", "vllm"):
        for max_lag in MAX_LAGS:
            for policy in ("fopd", "async") if max_lag else ("sync",):
                name = f"fopd, max_lag {max_lag}, {policy}, {engine}"
                found[name] = lambda m=max_lag, p=policy, e=engine: of_fopd(m, p, e, args)
    chosen = {
        name: run for name, run in found.items() if not args.only or any(word in name for word in args.only)
    }
    if not chosen:
        sys.exit(f"--only: there is none of that name; there are {', '.join(found)}")
    return chosen


def table(curves: dict[str, list[Curve]], to: float) -> str:
    """Markdown; the median over repeats of each figure, and ratios to the plain loop where it ran."""

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    def shown(value: float, digits: int = 0) -> str:
        return f"{value:.{digits}f}" if math.isfinite(value) else "never" if value == math.inf else "-"

    plain = curves.get("plain loop")
    against = median([c.seconds_to(to) for c in plain]) if plain else math.nan
    lines = [
        (
            f"| contender | seconds to KL {to} | plain loop = 1 | seconds a step | answer tokens/s | last "
            "held-out KL |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for name, found in curves.items():
        seconds = median([c.seconds_to(to) for c in found])
        rate = median([c.tokens / c.steps[-1] for c in found])
        lines.append(
            f"| {name} | {shown(seconds)} | {shown(seconds / against, 2)} | "
            f"{median([c.a_step for c in found]):.1f} | "
            f"{f'{rate:.0f}' if rate else '-'} | {median([c.evaluations[-1][1] for c in found]):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", type=Path, default=ROOT / "recipes" / "real-pair", help="a directory, or tiny"
    )
    parser.add_argument("--questions", type=Path, default=ROOT / "recipes" / "questions.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=HELD_OUT,
        help="running requests of the sampler; beyond the held-out questions it trains while the clock "
        "is stopped",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=float, default=0.63, help="held-out KL, in nats a token")
    parser.add_argument("--mode", default="auto", help="fopd's placement.mode")
    parser.add_argument("--only", nargs="*", help="contenders whose names contain one of these")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="jsonl file to append each contender's curve to")
    args = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if str(args.pair) == "tiny":
            tiny(args, Path(folder))
        for _ in range(args.repeats):
            for name, run in contenders(args).items():
                curve = run()
                curves.setdefault(name, []).append(curve)
                print(
                    f"{name}: {curve.seconds_to(args.to):.0f} s to {args.to}, {curve.a_step:.1f} s a "
                    "step, KL " + " ".join(f"{kl:.3f}" for _, kl in curve.evaluations),
                    file=sys.stderr,
                    flush=True,
                )
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({"contender": name, "lr": args.lr, **vars(curve)}) + "\n")
    print(table(curves, args.to))


if __name__ == "__main__":
    main()
