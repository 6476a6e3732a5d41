#!/usr/bin/env python3
"""What a checkpoint costs a run: seconds by which it delays the learner's next steps, and for which the
conductor dispatches nothing.

    python benchmarks/checkpoint.py [--pair recipes/real-pair] [--rounds 3] [--steps 3] [--folder runs]
    python benchmarks/checkpoint.py --conductor [--samples 200] [--response 512] [--width 576]

The first: one learner, as a worker has it, on the pair's student takes the same optimizer step again and
again. A round is some steps without a save, some after a save that the learner waits for
(`checkpoint.asynchronous: false`), and some beside a save from a copy (`true`): at least `--steps` of each,
and until the save is complete. Both write to `--folder`, sync and hash. The cost of a save is the time of its
block less that of as many steps without one (the median of all rounds). Reported are medians, and the range
of the costs. The last column says what share of a run that is with a save every 15 minutes, the default.

The second: a conductor's part of a save, with a buffer of scored samples with hidden states (bf16; by
default of the pair's teacher), and a learner that has nothing to write. Reported are the seconds from the
decision until the conductor can dispatch again, the longest turn of its loop while the rest is written (it
sleeps for a millisecond in each), and the seconds until the checkpoint is complete: median and range of all
rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.buffer import Buffer
from fopd_cli.runtime.build import learner_config
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.writer import Writer
from fopd_cli.runtime.journal.beside import Beside
from fopd_cli.runtime.journal.checkpoint import CheckpointStore
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.journal.saving import Saver
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.memory.arena import aligned
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.scheduling.tickets import State as TicketState
from fopd_cli.runtime.scheduling.tickets import Ticket
from fopd_cli.runtime.state import State
from fopd_cli.samples import Rollout, Sample, TargetSpec, TeacherTargets

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROMPT, RESPONSE = 32, 64


def rollouts_of(count: int, vocab: int, response: int) -> list[Rollout]:
    rng = np.random.Generator(np.random.PCG64(0))
    return [
        Rollout(
            key=key,
            token_ids=rng.integers(4, vocab, size=PROMPT + response).astype(np.int32),
            prompt_length=PROMPT,
            loss_mask=np.ones(response, dtype=bool),
            logprobs=np.full(response, -5.0, dtype=np.float32),
            spans=[(0, 0, response)],
            finish="length",
        )
        for key in range(count)
    ]


def samples_of(count: int, vocab: int, width: int) -> list[Sample]:
    return [
        Sample(rollout, TeacherTargets("hidden", hidden=torch.randn(RESPONSE, width)), 0)
        for rollout in rollouts_of(count, vocab, RESPONSE)
    ]


@dataclass
class Block:
    """Steps, with or without a save at their beginning; in seconds."""

    steps: int
    total: float
    stopped: float = 0.0  # until the learner could go on
    written: float = 0.0  # until the checkpoint was complete


class Bench:
    def __init__(self, pair: Path, batch: int, folder: Path) -> None:
        config, teacher = (hf.load_config(str(pair / name), name) for name in ("student", "teacher"))
        vocab = hf.vocab_size(config)
        models = [f"student.model={pair / 'student'}", f"teacher.model={pair / 'teacher'}"]
        recipe = load_recipe(ROOT / "recipes" / "real-cpu.yaml", [*models, "learner.steps=100000"])
        learning = learner_config(recipe, torch.float32, vocab, PROMPT + RESPONSE)
        head = hf.load_head(str(pair / "teacher"), "teacher", torch.float32)
        model = hf.load_model(str(pair / "student"), "student", torch.float32)
        # at a rate that leaves the weights as they are: each step is the same
        still = replace(learning, learner=learning.learner.model_copy(update={"lr": 1e-12}))
        self.learner = FsdpLearner(model, [head], still, DEVICE, 0, 1)
        self.samples = samples_of(batch, vocab, hf.hidden_width(teacher))
        self.store, self.posted = CheckpointStore(folder), list[Any]()
        self.store.open(None)
        self.writer = Writer(self.posted.append)
        self.state_bytes = 12 * sum(p.numel() for p in self.learner.student.parameters())

    def step(self) -> None:
        self.learner.train(self.learner.version, self.samples)

    def block(self, least: int, staged: bool | None) -> Block:
        """`staged`: as in `SaveCommand`; None: no save."""
        began, steps, stopped, written = time.perf_counter(), 0, 0.0, 0.0
        commit = None
        if staged is not None:
            folder = self.store.begin(self.learner.version)
            self.writer.write(self.learner.snapshot(staged), m.SaveCommand(folder / "learner", staged))
            stopped = time.perf_counter() - began
        while steps < least or (staged is not None and not written):
            self.step()
            steps += 1
            if self.posted:
                saved = self.posted.pop()
                files = {f"learner/{name}": entry for name, entry in saved.files.items()}
                text = json.dumps(saved.extra)
                commit = Beside(partial(self.store.commit, folder, text, files))
            if commit is not None and commit.over:
                commit.result()
                written, commit = time.perf_counter() - began, None
        return Block(steps, time.perf_counter() - began, stopped, written)


class ConductorBench:
    """A run's state with a full buffer, and what saves it; without workers."""

    def __init__(self, pair: Path, samples: int, response: int, width: int | None, folder: Path) -> None:
        models = [f"student.model={pair / 'student'}", f"teacher.model={pair / 'teacher'}"]
        recipe = load_recipe(ROOT / "recipes" / "real-cpu.yaml", [*models, "learner.steps=100000"])
        inputs = load_inputs(recipe, place(recipe, 0))
        self.state = State(inputs)
        width = width or hf.hidden_width(inputs.teachers[0].config)
        spec = TargetSpec("hidden", width, torch.bfloat16)
        self.bytes = samples * spec.nbytes(response)
        self.buffer = self.state.buffer = Buffer((spec,), samples * aligned(spec.nbytes(response)))
        for rollout in rollouts_of(samples, inputs.vocab, response):
            self.buffer.add(rollout, 0).grade = 1.0
        self.buffer.reserve(range(samples))
        memory = self.buffer.arena.memory.numpy()
        noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, 1 << 20, np.uint8)
        for begin in range(0, len(memory), len(noise)):
            memory[begin:][: len(noise)] = noise[: len(memory) - begin]
        tickets = {
            key: Ticket(key, inputs.stream.train_id(key), TicketState.SCORED, 0, graded=True, drawn=True)
            for key in range(samples)
        }
        self.state.schedule.tickets = tickets
        self.journal = Journal(recipe, inputs.tokenizer, lambda *_: Recorded(), quiet=True)
        channel = WeightChannel.create(inputs.published, memory=False)
        self.saver = Saver(self.state, RunDir(folder), self.journal, channel, torch.float32)

    def round(self) -> tuple[float, float, float]:
        """Seconds until it can dispatch, of the longest turn, until the checkpoint is complete."""
        self.state.schedule.step += 1
        began = time.perf_counter()
        self.saver.save(False, Path.mkdir)
        stopped = time.perf_counter() - began
        self.saver.on_saved(m.Saved({}, m.Span("save", 0.0, 0.0)))
        longest, turn = 0.0, time.perf_counter()
        while self.state.schedule.step not in self.saver.store.steps():
            time.sleep(0.001)
            self.saver.settle(wait=False)
            last, turn = turn, time.perf_counter()
            longest = max(longest, turn - last)
        written = time.perf_counter() - began
        self.saver.settle(wait=True)
        return stopped, longest, written


def of_conductor(bench: ConductorBench, rounds: int) -> None:
    with bench.journal:
        bench.journal.begin()
        bench.saver.begin()
        found = []
        for _ in range(rounds):
            found.append(bench.round())
            stopped, longest, written = found[-1]
            print(f"stands still {stopped:.3f} s, longest turn {longest:.3f} s, complete {written:.2f} s")
    print(f"\n{len(bench.buffer)} samples, {bench.bytes / 1e9:.2f} GB of targets\n")
    print("| conductor stands still | longest turn meanwhile | save complete after |")
    print("|---|---|---|")
    cells = (
        f"{statistics.median(values):.3f} s ({min(values):.3f} .. {max(values):.3f})"
        for values in zip(*found, strict=True)
    )
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, default=ROOT / "recipes" / "real-pair")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="at least, in each block")
    parser.add_argument("--batch", type=int, default=4, help="samples in a step")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary one")
    parser.add_argument("--threads", type=int, help="of the learner; default: all cores")
    parser.add_argument("--conductor", action="store_true", help="measure the conductor, not the learner")
    parser.add_argument("--samples", type=int, default=200, help="with --conductor: in its buffer")
    parser.add_argument("--response", type=int, default=512, help="with --conductor: tokens of each")
    parser.add_argument("--width", type=int, help="with --conductor: of a hidden state")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    if args.conductor:
        try:
            pair = args.pair.resolve()
            of_conductor(ConductorBench(pair, args.samples, args.response, args.width, folder), args.rounds)
        finally:
            shutil.rmtree(folder)
        return
    kinds: dict[str, bool | None] = {
        "no save": None,
        "asynchronous: false": False,
        "asynchronous: true": True,
    }
    found: dict[str, list[Block]] = {kind: [] for kind in kinds}
    try:
        bench = Bench(args.pair.resolve(), args.batch, folder / "checkpoints")
        for staged in (None, True):
            bench.block(1, staged)  # to warm up: AdamW's states, the buffers of the copy
        for _ in range(args.rounds):
            for kind, staged in kinds.items():
                found[kind].append(bench.block(args.steps, staged))
                print(f"{kind}: {found[kind][-1]}", flush=True)
    finally:
        shutil.rmtree(folder)
    plain = statistics.median(b.total / b.steps for b in found["no save"])
    print(f"\nstate {bench.state_bytes / 1e9:.2f} GB, a step without a save {plain:.2f} s\n")
    print("| | learner stands still | save complete after | delays the run by | of a run, every 15 min |")
    print("|---|---|---|---|---|")
    for kind, blocks in found.items():
        costs = [b.total - b.steps * plain for b in blocks]
        cost, stopped, written = (
            statistics.median(values)
            for values in (costs, [b.stopped for b in blocks], [b.written for b in blocks])
        )
        print(
            f"| {kind} | {stopped:.2f} s | {written:.1f} s | "
            f"{cost:.1f} s ({min(costs):.1f} .. {max(costs):.1f}) | {cost / 900:.1%} |"
        )


if __name__ == "__main__":
    main()
