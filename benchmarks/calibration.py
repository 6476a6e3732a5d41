#!/usr/bin/env python3
"""Do the drift estimators rank samples as the exact drift does, and does freshness predict what it should?

    python benchmarks/calibration.py [--task short] [--out docs/staleness]

One synchronous run keeps all its versions. At several versions t, prompts are answered by versions t, t - 1,
.. t - 16. Each answer is judged as by a learner at t: its drift by every estimator and as the exact KL, its
freshness f_i, and the cosine between its gradient and the fresh one, which is that of the exact reverse KL on
many answers of version t to the same prompt. Prints and writes rank correlations (Spearman's), bias and cost;
no training loop with staleness runs here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inline import Inline, Timed
from torch import Tensor

from fopd_cli.engines.learner.micro_batch import MicroBatch
from fopd_cli.freshness import drift, score
from fopd_cli.losses.chunked import Weighting, chunked_objective
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.inprocess import LocalEngines
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.samples import Request, Rollout, Sample, SamplingParams, TeacherTargets

HERE = Path(__file__).resolve().parent
LAGS, TOPK, FRESH = (0, 1, 2, 4, 8, 16), 8, 64
LOSSES = {
    "pg_cached": LossSpec("reverse_kl", "sampled", advantage="cached"),
    "pg_recomputed, ratio": LossSpec("reverse_kl", "sampled", advantage="recomputed", importance=True),
    "reverse_kl": LossSpec("reverse_kl", "full"),
}


class Keeping(Timed):
    """Keeps every version's weights."""

    def __init__(self, engines: LocalEngines, channel: WeightChannel) -> None:
        super().__init__(engines)
        self.channel, self.versions = channel, dict[int, dict[str, Tensor]]()
        self._keep()

    def _keep(self) -> None:
        version = self.engines.learner.engine.version
        self.versions[version] = {name: tensor.clone() for name, tensor in self.channel.read(version)}

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        answers = super().do(engine, command)
        if isinstance(command, m.TrainCommand):
            self._keep()
        return answers


class Kept(Inline):
    """A run that keeps every version."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.stream, self.spec = self.inputs.stream, self.inputs.target_specs[0]
        self.learner: Any = self.engines.learner.engine
        self.teacher, self.sampler = self.engines.teachers[0].engine, self.engines.samplers[0].engine

    def _watched(self, engines: LocalEngines) -> Keeping:
        keeping = Keeping(engines, self.setup.weights.host)
        self.versions = keeping.versions
        return keeping


def answers(run: Kept, version: int, prompts: Sequence[int], each: int, seed: int) -> list[Rollout]:
    """`each` responses to every prompt, sampled by a version, with its full distribution at each position."""
    run.sampler.load(version, run.versions[version].items())
    params = SamplingParams(max_new_tokens=run.recipe.sampler.max_new_tokens, keep_topk=-1)
    ids = [run.stream.token_ids(run.stream.train_id(p)) for p in prompts]
    run.sampler.submit([Request(i, ids[i // each], seed + i, params) for i in range(len(prompts) * each)])
    found: list[Rollout] = []
    while run.sampler.busy:
        found += run.sampler.step()
    return sorted(found, key=lambda r: r.key)


def judged(run: Kept, rollouts: list[Rollout], lag: int) -> list[Sample]:
    samples = []
    for rollout in rollouts:
        hidden = torch.zeros(rollout.response_length, run.spec.width)
        samples.append(Sample(rollout, TeacherTargets("hidden", hidden=hidden), lag))
    run.teacher.score(rollouts, [s.targets for s in samples])
    return samples


def gradient(run: Kept, samples: list[Sample], loss: LossSpec) -> Tensor:
    """Gradient of the samples' mean loss with respect to all of the student's weights, flat."""
    lm = run.learner.student.lm
    batch = MicroBatch.of(samples, True)
    share = 1 / (len(samples) * batch.lengths[batch.sample])
    nothing = torch.zeros_like(share)
    hidden = batch.tokens.hidden(lm).index_select(0, batch.index)
    head = lm.get_output_embeddings().weight
    value, _ = chunked_objective(
        loss,
        hidden,
        batch.at,
        head,
        run.learner.teacher_heads[0],
        Weighting(batch.sample, share, nothing, nothing),
    )
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(lm.parameters()))])


@torch.no_grad()
def drifts(run: Kept, sample: Sample) -> dict[str, float]:
    """D_roll of one sample by every estimator."""
    batch = MicroBatch.of([sample], True)
    lm = run.learner.student.lm
    hidden = batch.tokens.hidden(lm).index_select(0, batch.index)
    new = torch.log_softmax(hidden @ lm.get_output_embeddings().weight.T, -1)
    old = torch.from_numpy(sample.rollout.topk_logprobs)
    new_y, ids = new.gather(-1, batch.at.tokens[:, None])[:, 0], old.topk(TOPK, -1).indices
    return {
        "exact": drift.exact(new, old).mean().item(),
        f"topk, k = {TOPK}": drift.topk(new.gather(-1, ids), old.gather(-1, ids)).mean().item(),
        "sampled": drift.sampled(new_y, batch.at.behaviour).mean().item(),
        "quadratic": drift.quadratic(new_y, batch.at.behaviour).mean().item(),
    }


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks of the values; ties share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def measure(run: Kept, at: Sequence[int], count: int) -> list[dict[str, Any]]:
    """A row for each sample: lag, drifts, cosines of its gradients with the fresh one."""
    rows = []
    for t in at:
        run.learner.student.lm.load_state_dict(run.versions[t], strict=False)
        prompts = list(range(t * count, (t + 1) * count))
        fresh_answers = judged(run, answers(run, t, prompts, FRESH, seed=t), 0)
        fresh = [
            gradient(run, fresh_answers[i * FRESH : (i + 1) * FRESH], LOSSES["reverse_kl"])
            for i in range(count)
        ]
        for lag in LAGS:
            samples = judged(run, answers(run, t - lag, prompts, 1, seed=1000 * t + lag), lag)
            for sample, reference in zip(samples, fresh, strict=True):
                cosines = {
                    name: torch.cosine_similarity(gradient(run, [sample], loss), reference, 0).item()
                    for name, loss in LOSSES.items()
                }
                rows.append({"version": t, "lag": lag, "drift": drifts(run, sample), "cosine": cosines})
        print(f"version {t} done", flush=True)
    return rows


def freshness(rows: Sequence[dict[str, Any]], estimator: str) -> list[float]:
    """f_i with alpha = 1; a single turn has no supervision drift."""
    d = torch.tensor([r["drift"][estimator] for r in rows])
    one, lag = torch.ones_like(d), torch.tensor([float(r["lag"]) for r in rows])
    return score.freshness(lag, d, torch.zeros_like(d), one, one, 1.0, 1.0).tolist()


def report(rows: Sequence[dict[str, Any]]) -> str:
    stale = [r for r in rows if r["lag"] > 0]
    names = list(rows[0]["drift"])
    exact = [r["drift"]["exact"] for r in stale]
    lines = [
        (
            "| estimator of D_roll | Spearman with exact, all lags | the same at lag 8 | mean / exact's "
            "mean, lags 1, 8, 16 |"
        ),
        "|---|---|---|---|",
    ]
    at8 = [r for r in stale if r["lag"] == 8]
    for name in names[1:]:
        own = [r["drift"][name] for r in stale]
        within = spearman([r["drift"][name] for r in at8], [r["drift"]["exact"] for r in at8])
        bias = [
            np.mean([r["drift"][name] for r in stale if r["lag"] == k])
            / np.mean([r["drift"]["exact"] for r in stale if r["lag"] == k])
            for k in (1, 8, 16)
        ]
        lines.append(
            f"| {name} | {spearman(own, exact):.3f} | {within:.3f} | {', '.join(f'{b:.2f}' for b in bias)} |"
        )
    lines += [
        "",
        "| lag | exact D_roll, nats | " + " | ".join(f"cosine, {name}" for name in LOSSES) + " |",
        "|---|---|" + "---|" * len(LOSSES),
    ]
    for lag in LAGS:
        own = [r for r in rows if r["lag"] == lag]
        cosines = " | ".join(f"{np.mean([r['cosine'][name] for r in own]):.3f}" for name in LOSSES)
        lines.append(f"| {lag} | {np.mean([r['drift']['exact'] for r in own]):.4f} | {cosines} |")
    lines += [
        "",
        "| Spearman with the cosine, lags mixed (and at lag 8 alone) | " + " | ".join(LOSSES) + " |",
        "|---|" + "---|" * len(LOSSES),
    ]
    signals: dict[str, Any] = {"1/(tau + 1)": lambda some: [1 / (r["lag"] + 1) for r in some]}
    for name in names:
        signals[f"-D_roll, {name}"] = lambda some, n=name: [-r["drift"][n] for r in some]
        signals[f"f_i, {name}"] = lambda some, n=name: freshness(some, n)
    for label, signal in signals.items():
        cells = []
        for loss in LOSSES:
            mixed = spearman(signal(rows), [r["cosine"][loss] for r in rows])
            alone = (
                ""
                if label == "1/(tau + 1)"
                else f" ({spearman(signal(at8), [r['cosine'][loss] for r in at8]):.2f})"
            )
            cells.append(f"{mixed:.2f}{alone}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs(recipe: Path, overrides: list[str]) -> str:
    """Milliseconds per decoding step and per trained token with each estimator."""
    lines = ["| drift | ms a decoding step | ms a trained token |", "|---|---|---|"]
    for name in ("sampled", "quadratic", "topk", "exact"):
        run = Inline(
            load_recipe(
                recipe,
                [*overrides, "learner.steps=20", f"freshness.drift={name}", f"freshness.drift_k={TOPK}"],
            )
        ).run()
        lines.append(
            f"| {name} | {run.spent['sample'] / run.work['sample']:.3f} | "
            f"{run.spent['train'] / run.work['train']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=["short", "long"], default="short")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "staleness")
    parser.add_argument("--prompts", type=int, default=24, help="at each version")
    parser.add_argument("--versions", type=int, nargs="+", default=[30, 60, 100, 140, 180])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = {"short": "1e-3", "long": "3e-4"}[args.task]
    overrides = [
        "schedule.lag=0",
        "eval.every=0",
        f"learner.lr={rate}",
        "freshness.policy=sync",
        f"learner.steps={max(args.versions)}",
    ]
    recipe = HERE / "recipes" / f"{args.task}.yaml"
    run = Kept(load_recipe(recipe, overrides))
    run.run()
    rows = measure(run, args.versions, args.prompts)
    text = "\n\n".join([f"{len(rows)} samples, task {args.task}", report(rows), costs(recipe, overrides)])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"calibration-{args.task}.md").write_text(text + "\n")
    (args.out / f"calibration-{args.task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(text)


if __name__ == "__main__":
    main()
