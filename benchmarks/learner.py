#!/usr/bin/env python3
"""What freshness control costs, what FSDP2 costs where it has nothing to shard, and how fast a step is
compared with TRL's.

    python benchmarks/learner.py [--repeats 20] [--hidden 256] [--vocab 32000]

Times whole optimizer steps of one process on one batch, with the variants in a rotating order within each
repeat, and prints the median of the pairwise ratios. The first table is in CPU seconds (on a CPU, wall time
on a shared machine says more about its neighbors), the second in wall time, because it compares programs that
use their threads differently. `loss alone` computes the distillation loss and nothing for freshness. TRL is
`training_step` of `GKDTrainer` (off-policy) and of `DistillationTrainer` (with the samples as what it
generated): reverse KL, gradient clipping, AdamW, on the same two models and the same samples, padded. Its
step also runs the teacher, so ours is given with the teacher's scoring (`teacher and learner`) and without.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from fopd_cli.engines.learner import learner as fsdp_learner
from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.engines.tokens.token_batch import TokenBatch
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.freshness import drift
from fopd_cli.freshness.policies import POLICIES, PolicyName
from fopd_cli.losses.terms import LossSpec
from fopd_cli.recipe import Freshness, Learner
from fopd_cli.samples import Rollout, Sample, TeacherTargets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model(hidden: int, vocab: int) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        head_dim=32,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def same_samples(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The batch as the collator of `GKDTrainer` would give it."""
    ids = TokenBatch.of([s.rollout.token_ids for s in samples], False, DEVICE).ids
    lengths = torch.tensor([len(s.rollout.token_ids) for s in samples], device=DEVICE)
    columns = torch.arange(ids.shape[1], device=DEVICE)[None]
    mask = columns < lengths[:, None]
    prompt = torch.tensor([s.rollout.prompt_length for s in samples], device=DEVICE)
    answer = mask & (columns >= prompt[:, None])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(answer, ids, -100)}


def generated(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """The batch as `DistillationTrainer` has it after generating; all prompts have one length."""
    prompts = np.stack([s.rollout.token_ids[: s.rollout.prompt_length] for s in samples])
    answers = TokenBatch.of([s.rollout.response_ids for s in samples], False, DEVICE).ids
    lengths = torch.tensor([s.rollout.response_length for s in samples], device=DEVICE)
    prompt_ids = torch.from_numpy(prompts).long().to(DEVICE)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": answers,
        "completion_mask": (torch.arange(answers.shape[1], device=DEVICE)[None] < lengths[:, None]).long(),
        "num_items_in_batch": lengths.sum().float(),
    }


def trl_arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "beta": 1.0,
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "max_grad_norm": 1.0,
        "use_cpu": DEVICE.type == "cpu",
        "bf16": False,
        "report_to": [],
        "gradient_checkpointing": False,
    }


def gkd_trainer(student: Any, teacher: Any, folder: str) -> Any:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    talk = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(**trl_arguments(folder), lmbda=0.0),
        processing_class=trl_tokenizer(),
        train_dataset=Dataset.from_list([{"messages": talk}] * 8),
    )


def distillation_trainer(student: Any, teacher: Any, folder: str) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        """Takes the given samples as what it generated."""

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return generation_batch

    return Given(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**trl_arguments(folder)),
        processing_class=trl_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 8),
    )


def trl_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    folder = Path(__file__).parent.parent / "recipes" / "tiny" / "student"
    return PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")


def trl_step(trainer: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what train() would have set
    trainer.model.train()
    parameters = list(trainer.model.parameters())

    def whole() -> None:
        trainer.training_step(trainer.model, dict(inputs), None)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return whole


def against_trl(args: argparse.Namespace, folder: str) -> None:
    """Tokens per second of whole steps, side by side."""
    samples = batch(args)
    tokens = sum(len(s.rollout.token_ids) for s in samples)
    ours = learner(args.hidden, args.vocab, "fopd")
    judge = TransformersTeacher(model(args.hidden, args.vocab), DEVICE, 1, 4096, args.vocab, 4096)
    ours.teacher_heads = [judge.head()]

    def models() -> tuple[Any, Any, str]:
        return model(args.hidden, args.vocab), model(args.hidden, args.vocab), folder

    def whole() -> None:
        judge.score([s.rollout for s in samples], [s.targets for s in samples])
        ours.train(ours.version, samples)

    others = {
        "learner, padded": learner(args.hidden, args.vocab, "fopd", packing=False),
        "learner, compiled": learner(args.hidden, args.vocab, "fopd", compile=True),
        "learner, LoRA of rank 16": learner(args.hidden, args.vocab, "fopd", rank=16),
    }
    contenders: dict[str, Callable[[], None]] = {
        "teacher and learner": whole,
        "learner": partial(step, ours, samples),
        **{name: partial(step, one, samples) for name, one in others.items()},
        "TRL GKDTrainer": trl_step(gkd_trainer(*models()), same_samples(samples)),
        "TRL DistillationTrainer": trl_step(distillation_trainer(*models()), generated(samples)),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(args.repeats + 2):
        order = list(contenders)
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            start = time.perf_counter()
            contenders[name]()
            finish()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        line = f"{name:28} median {tokens / statistics.median(seconds):9,.0f} tokens/s"
        for rival in ("GKDTrainer", "DistillationTrainer"):
            ratios = [a / b for a, b in zip(times[f"TRL {rival}"], seconds, strict=True)]
            line += f"   x {rival}: {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        print(line)


def batch(args: argparse.Namespace) -> list[Sample]:
    rng = np.random.Generator(np.random.PCG64(0))
    samples = []
    for i in range(args.samples):
        n = int(rng.integers(max(1, int(args.shortest * args.length)), args.length))
        ids = rng.integers(0, args.vocab, size=n + 8).astype(np.int32)
        logprobs = np.full(n, -np.log(args.vocab), dtype=np.float32)
        rollout = Rollout(i, ids, 8, np.ones(n, dtype=bool), logprobs, [(0, 0, n)], "length")
        samples.append(
            Sample(rollout, TeacherTargets("hidden", hidden=torch.randn(n, args.hidden)), lag=i % 3)
        )
    return samples


def learner(
    hidden: int, vocab: int, policy: PolicyName, sharded: bool = False, rank: int = 0, **changes: Any
) -> FsdpLearner:
    """`rank` of LoRA adapters, 0 for none; `changes` are keys of the learner's section."""
    section = Learner(lr=1e-5, warmup_steps=0, steps=10**6, micro_tokens=4096)
    config = LearnerConfig(
        learner=section.model_copy(update=changes),
        freshness=Freshness(policy=policy, xi=0.01, weights="raw"),
        loss=LossSpec("reverse_kl", "full"),
        average="sample",
        anchor=1.0 if POLICIES[policy].anchor else 0.0,
        compute_dtype=torch.float32,
        vocab=vocab,
        longest=4096,
    )
    head = torch.randn(vocab, hidden) / hidden**0.5
    student = model(hidden, vocab)
    if rank:
        lora.add_adapters(student, rank, 2.0 * rank, "all-linear", 0, torch.float32)
    # every compute dtype but fp32 shards; undoing the cast leaves only FSDP's own work as the difference
    if sharded:
        policy_class = fsdp_learner.MixedPrecisionPolicy
        fsdp_learner.MixedPrecisionPolicy = lambda **kw: policy_class(**{**kw, "param_dtype": torch.float32})  # type: ignore[misc, assignment]
        made = FsdpLearner(student, [head], replace(config, compute_dtype=torch.bfloat16), DEVICE, 0, 1)
        fsdp_learner.MixedPrecisionPolicy = policy_class  # type: ignore[misc]
        return made
    return FsdpLearner(student, [head], config, DEVICE, 0, 1)


class without_drift:
    """Inside it, the drift estimator does nothing: what remains is only the loss."""

    def __enter__(self) -> None:
        self.real = drift.sampled
        drift.sampled = lambda new, old: torch.zeros_like(old)

    def __exit__(self, *_: Any) -> None:
        drift.sampled = self.real


def step(one: FsdpLearner, samples: list[Sample]) -> None:
    one.train(one.version, samples)


def finish() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(one: FsdpLearner, samples: list[Sample]) -> float:
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    finish()
    start = clock()
    step(one, samples)
    finish()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="of the longest response")
    parser.add_argument("--shortest", type=float, default=0.5, help="response, as a share of the longest")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        measure(args)
        dist.destroy_process_group()
        if importlib.util.find_spec("trl") is None:
            print("not beside TRL's, which is not installed (pip install 'fopd[dev]')")
        else:
            against_trl(args, folder)


def measure(args: argparse.Namespace) -> None:
    samples = batch(args)
    variants = {
        "loss alone": learner(args.hidden, args.vocab, "async"),
        "loss alone, again": learner(args.hidden, args.vocab, "async"),
        "async (drift measured)": learner(args.hidden, args.vocab, "async"),
        "fopd (weights, anchor)": learner(args.hidden, args.vocab, "fopd"),
        "fopd under FSDP2, one rank": learner(args.hidden, args.vocab, "fopd", sharded=True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(args.repeats + 2):
        order = list(variants.items())
        for name, one in order[repeat % len(order) :] + order[: repeat % len(order)]:
            if name.startswith("loss alone"):
                with without_drift():
                    seconds = timed(one, samples)
            else:
                seconds = timed(one, samples)
            if repeat >= 2:
                times[name].append(seconds)
    tokens = sum(len(s.rollout.token_ids) for s in samples)
    print(
        f"{args.samples} samples, {tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, "
        f"{torch.get_num_threads()} threads"
    )
    for name, seconds_list in times.items():
        ratios = [a / b for a, b in zip(seconds_list, times["loss alone"], strict=True)]
        print(
            f"{name:28} median {statistics.median(seconds_list) * 1e3:7.1f} ms   x loss alone: "
            f"{statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
