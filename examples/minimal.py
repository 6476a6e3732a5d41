#!/usr/bin/env python3
"""On-policy distillation with freshness weights, in one process. Read this first.

    python examples/minimal.py      # under a minute on a CPU; no GPU, no download

    1. the student samples answers, and records each token's log-probability       (rollouts)
    2. the frozen teacher reads them, and says what it would have written          (hidden states)
    3. the learner takes samples from a buffer, weighs each by its freshness, and steps

The three take turns, so this is synchronous. Samples wait in a buffer while the student moves on: without it
no sample would ever lag, and every weight would be 1.

`fopd run` gives each role a process of its own, all busy at once. What it adds, and where to look:

    when to sample, so that no sample gets too old             fopd_cli/runtime/scheduling/schedule.py
    the loss without a [tokens, vocab] tensor                  fopd_cli/losses/chunked.py
    FSDP2, LoRA, packing, clipping, learning-rate schedules    fopd_cli/engines/learner/learner.py
    the anchor, the refresh, the noise floor of D_roll         fopd_cli/freshness/
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.learner.micro_batch import MicroBatch
from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.freshness import drift, score
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.losses.divergence import kl
from fopd_cli.samples import Request, Rollout, Sample, SamplingParams, TeacherTargets

TINY = Path(__file__).parent.parent / "recipes" / "tiny"  # 0.19M and 0.33M parameters
STEPS = 120
BATCH = 32  # samples that each step makes, and samples that it learns from
WAITING = 64  # samples that wait in the buffer meanwhile
MAX_NEW_TOKENS = 48
LEARNING_RATE = 2e-3
ALPHA, BETA = 1.0, 1.0  # how much each drift counts in the score
XI = 0.02  # samples less fresh than this teach nothing


def main() -> None:
    torch.set_num_threads(1)  # with models this small, threads would only wait for each other
    rng = random.Random(0)

    # The student twice: the sampler's copy gets the learner's weights after each step.
    path = str(TINY / "student")
    tokenizer = hf.load_tokenizer(path, "student")
    student = hf.load_model(path, "student", torch.float32)
    rules = hf.token_rules(path, tokenizer, student.config, "student")
    cpu, vocab = torch.device("cpu"), hf.vocab_size(student.config)
    sampler = TransformersSampler(hf.load_model(path, "student", torch.float32), rules, cpu, BATCH)
    student_head = hf.head_rule(student.config, "student").head(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))

    model = hf.load_model(str(TINY / "teacher"), "teacher", torch.float32)
    teacher = TransformersTeacher(model, cpu, world=1, micro_tokens=16384, vocab=vocab, longest=128)
    teacher_head, width = teacher.head(), hf.hidden_width(model.config)

    buffer: list[tuple[Rollout, TeacherTargets]] = []
    step = 0
    while step < STEPS:
        # 1. Sample.
        rollouts = sample(sampler, tokenizer, rng)

        # 2. Judge. Hidden states are exact, and much smaller than logits.
        targets = [TeacherTargets("hidden", torch.empty(r.response_length, width)) for r in rollouts]
        teacher.score(rollouts, targets)
        buffer += zip(rollouts, targets, strict=True)
        if len(buffer) < WAITING + BATCH:
            continue

        # 3. Learn from random samples of the buffer, each once. Rows below are response positions, N in all.
        rng.shuffle(buffer)
        samples = [Sample(r, t, lag=step - r.oldest_version) for r, t in buffer[:BATCH]]
        del buffer[:BATCH]
        batch = MicroBatch.of(samples, packed=False)
        hidden = batch.tokens.hidden(student)[batch.index]  # (N, width)
        assert batch.at.teacher_hidden is not None
        pi = torch.log_softmax(student_head.logits(hidden), -1)  # (N, V), the student now
        p = torch.log_softmax(teacher_head.logits(batch.at.teacher_hidden), -1)  # (N, V), the teacher

        # The loss: reverse KL, exact over the whole vocabulary, a mean over each sample's tokens.
        loss = per_sample(kl(pi, p), batch)  # (BATCH,)

        # D_roll: how far the student has moved since it sampled, estimated from the tokens that it drew.
        # D_sup is 0 here: the teacher is frozen, and reads what the student has read.
        now = pi.detach().gather(-1, batch.at.tokens[:, None])[:, 0]
        d_roll = per_sample(drift.sampled(now, batch.at.behaviour), batch)
        d_sup, covered = torch.zeros(BATCH), torch.ones(BATCH)

        # Equation 11: f = exp(-(alpha sqrt(D_roll) + beta sqrt(D_sup))) / (lag + 1), and w = relu(f - xi).
        f = score.freshness(batch.lag, d_roll, d_sup, covered, covered, ALPHA, BETA)
        w = score.weights(POLICIES["reweight"], f, batch.lag, XI)

        # Divided by the mean weight, so that lag does not shrink the step: only differences count.
        optimizer.zero_grad()
        ((w * loss).mean() / w.mean()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

        step += 1
        sampler.load(step, student.state_dict().items())
        if step == 1 or step % 10 == 0:
            print(
                f"step {step:3d}  KL {loss.mean():.3f}  lag {batch.lag.float().mean():.1f}  "
                f"D_roll {d_roll.mean():.4f}  freshness {f.min():.2f} to {f.max():.2f}",
                flush=True,
            )


def per_sample(terms: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Means over each sample's tokens: (N,) -> (BATCH,)."""
    return drift.per_sample(terms, batch.by_student, batch.by_student, batch.sample, len(batch.lag))[0]


def sample(sampler: TransformersSampler, tokenizer: Any, rng: random.Random) -> list[Rollout]:
    """Answers to BATCH questions. Every token knows its log-probability and the version that drew it."""
    params = SamplingParams(temperature=1.0, max_new_tokens=MAX_NEW_TOKENS)
    for number in range(BATCH):
        ids = np.array(tokenizer.encode(question(rng), add_special_tokens=False), dtype=np.int32)
        sampler.submit([Request(number, ids, rng.getrandbits(63), params)])
    done: list[Rollout] = []
    while sampler.busy:
        done += sampler.step()
    return sorted(done, key=lambda rollout: rollout.key)


def question(rng: random.Random) -> str:
    """`7+5-9+1+0-3=`. The teacher writes out the steps, modulo 10, and then the answer."""
    steps = (f"{rng.choice('+-')}{rng.randrange(10)}" for _ in range(5))
    return f"{rng.randrange(10)}{''.join(steps)}="


if __name__ == "__main__":
    main()
