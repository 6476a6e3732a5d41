"""A batch of real samples, an independent reference of the learner's step, and learners on several gloo
ranks.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.engines.learner.pieces import Piece
from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Publishing
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Freshness, Learner
from fopd_cli.samples import Request, Rollout, Sample, SamplingParams, TeacherTargets

CPU = torch.device("cpu")
VOCAB = 260


PLAIN = LearnerConfig(
    learner=Learner(lr=1e-3, warmup_steps=0, steps=10, clip=0.0, micro_tokens=64),
    freshness=Freshness(policy="async", xi=0.01, weights="raw"),
    loss=LossSpec("reverse_kl", "full"),
    average="sample",
    anchor=0.0,
    compute_dtype=torch.float32,
    vocab=VOCAB,
    longest=64,
)


def config(**changes: Any) -> LearnerConfig:
    """Of one plain step; `changes` as of `changed`."""
    return changed(PLAIN, **changes)


def changed(cfg: LearnerConfig, **changes: Any) -> LearnerConfig:
    """With other values of fields, or of keys of the learner's and the freshness's sections."""
    if "labels" in changes:
        changes["reexecute"] = cfg.freshness.reexecute.model_copy(update={"labels": changes.pop("labels")})
    learner = {k: v for k, v in changes.items() if k in Learner.model_fields}
    freshness = {
        k: v
        for k, v in changes.items()
        if (k in Freshness.model_fields and not hasattr(cfg, k)) or k == "policy"
    }
    return replace(
        cfg,
        learner=cfg.learner.model_copy(update=learner),
        freshness=cfg.freshness.model_copy(update=freshness),
        **{k: v for k, v in changes.items() if k not in learner and k not in freshness},
    )


class Held:
    """Stands before a learner's pieces: reading the last of them waits for `until`."""

    def __init__(self, learner: Publishing, until: Callable[[], None]) -> None:
        self.learner, self.until, self.version = learner, until, learner.version

    def pieces(self) -> list[Piece]:
        found = [Piece(p.name, p.start, p.read) for p in self.learner.pieces() or ()]
        assert found
        *others, last = found

        def read() -> torch.Tensor:
            self.until()
            return last.read()

        return [*others, replace(last, read=read)]

    def publish(self, dtypes: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("there are pieces")


def own_group(folder: Path) -> None:
    """The process group of a learner's one rank, made once per process."""
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/r", rank=0, world_size=1)


def make_samples(pair: Path, count: int = 7, drifted: bool = True, width: int = 128) -> list[Sample]:
    """Rollouts of the student of several lengths with hidden-state targets; `drifted`: lags 0..3, shifted
    log-probs.

    `width` is the teacher's hidden size.
    """
    sampler = on_weights(str(pair / "student"), torch.float32, CPU, count)
    rng = np.random.Generator(np.random.PCG64(0))
    sampler.submit(
        [
            Request(
                i,
                rng.integers(4, 200, size=2 + i % 3).astype(np.int32),
                7 + i,
                SamplingParams(max_new_tokens=4 + 2 * i),
            )
            for i in range(count)
        ]
    )
    rollouts: list[Rollout] = []
    while sampler.busy:
        rollouts += sampler.step()
    rollouts.sort(key=lambda r: r.key)
    model = hf.load_model(str(pair / "teacher"), "m", torch.float32)
    teacher = TransformersTeacher(model, CPU, 1, 4096, VOCAB, 64)
    targets = [TeacherTargets("hidden", hidden=torch.empty(r.response_length, width)) for r in rollouts]
    teacher.score(rollouts, targets)
    samples = []
    for i, (rollout, target) in enumerate(zip(rollouts, targets, strict=True)):
        if drifted:
            noise = 0.2 * rng.standard_normal(rollout.response_length).astype(np.float32)
            rollout = replace(rollout, logprobs=rollout.logprobs + noise)
        samples.append(Sample(rollout, target, lag=i % 4 if drifted else 0))
    return samples


def with_observations(samples: list[Sample]) -> list[Sample]:
    """The same samples as if tool output stood in the middle of the responses: not sampled, no loss."""
    turns = []
    for sample in samples:
        r = sample.rollout
        mask, logprobs = r.loss_mask.copy(), r.logprobs.copy()
        mask[1 : 1 + len(mask) // 3] = False
        logprobs[~mask] = np.nan
        turns.append(replace(sample, rollout=replace(r, loss_mask=mask, logprobs=logprobs)))
    return turns


def make_learner(pair: Path, cfg: LearnerConfig, rank: int = 0, world: int = 1) -> FsdpLearner:
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    return FsdpLearner(
        hf.load_model(str(pair / "student"), "m", torch.float32), [head], cfg, CPU, rank, world
    )


def save(learner: FsdpLearner, folder: Path) -> dict[str, Any]:
    """Write its state into a folder; returns what `restore` needs beside it."""
    snapshot = learner.snapshot(staged=False)
    snapshot.write(folder)
    return snapshot.extra


def gradients(learner: FsdpLearner) -> dict[str, np.ndarray]:
    """Full gradients by parameter name (a collective on several ranks)."""
    out = {}
    for name, parameter in learner.student.lm.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        out[name.replace("_checkpoint_wrapped_module.", "")] = grad.detach().float().numpy().copy()
    return out


def reference(pair: Path, samples: list[Sample], cfg: LearnerConfig) -> tuple[float, dict[str, np.ndarray]]:
    """The objective and its gradient, sample by sample, full logits, no batching, no library of ours but the
    score.

    Written from the paper's formulas: reverse KL, sampled drift, equation 11, raw weights.
    """
    student = hf.load_model(str(pair / "student"), "m", torch.float32).train()
    teacher = hf.load_model(str(pair / "teacher"), "m", torch.float32)
    total = torch.zeros(())
    all_tokens = sum(int(s.rollout.loss_mask.sum()) for s in samples)
    for sample in samples:
        r = sample.rollout
        ids = torch.from_numpy(r.token_ids).long()[None]
        logits = student(ids).logits[0, r.prompt_length - 1 : -1]
        with torch.no_grad():
            judged = teacher(ids).logits[0, r.prompt_length - 1 : -1]
        pi, p = torch.log_softmax(logits, -1), torch.log_softmax(judged, -1)
        kept = torch.from_numpy(np.flatnonzero(r.loss_mask))
        pi, p = pi[kept], p[kept]
        loss = (pi.exp() * (pi - p)).sum(-1).mean()
        y = torch.from_numpy(r.response_ids).long()[kept]
        log_rho = pi[torch.arange(len(y)), y] - torch.from_numpy(r.logprobs)[kept]
        rho = log_rho.exp()
        drift = (rho * log_rho - rho + 1).mean()
        weight = 1.0
        if cfg.policy.weights == "freshness":
            f = np.exp(-cfg.freshness.alpha * np.sqrt(max(0.0, drift.item()))) / (sample.lag + 1)
            weight = max(0.0, f - cfg.freshness.xi)
        share = len(y) / all_tokens if cfg.average == "token" else 1 / len(samples)
        pull = cfg.anchor
        if cfg.pace is not None and sample.lag > 0:
            pull = min(pull, max(1.0, cfg.pace / sample.lag))
        total = total + weight * share * (loss + pull * drift)
    total.backward()
    return total.item(), {
        n: q.grad.numpy().copy() for n, q in student.named_parameters() if q.grad is not None
    }


def on_ranks(world: int, folder: Path, function: Any, *args: Any) -> Any:
    """Run `function(rank, world, *args)` on gloo ranks; returns what rank 0 returned."""
    out = folder / "rank0.pkl"
    mp.spawn(_rank_main, args=(world, str(folder / "rendezvous"), str(out), function, args), nprocs=world)  # type: ignore[no-untyped-call]
    return pickle.loads(out.read_bytes())


def _rank_main(rank: int, world: int, rendezvous: str, out: str, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    result = function(rank, world, *args)
    if rank == 0:
        Path(out).write_bytes(pickle.dumps(result))
    dist.barrier()
    os._exit(0)  # past the interpreter's teardown, in which gloo's threads sometimes abort the process
