"""One role of a real pair in a process of its own, doing a step of its work: how much memory it took at most,
and what the memory model says. `python memory_kit.py PAIR ROLE HOW [cpu|cuda]` prints both as JSON; on CUDA
what was allocated at most is compared, without what CUDA and its libraries take, and what the allocator
reserved is printed beside it.

HOW is a dtype for teachers and samplers. For learners it is plain or checkpointed, which compute in fp32;
mixed, in bf16 from fp32 masters, as recipes do; or lora, adapters in fp32 over a base in bf16.

The role "crowd" is a sampler of a small model whose rows hold far more tokens than a pass may have; HOW is
one of CROWDS, and PAIR is not read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import learner_kit as kit
import numpy as np
import torch

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.engines.models.shapes import shapes
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.recipe.schema import Learner, Sampler, Teacher
from fopd_cli.runtime.memory import model as memory
from fopd_cli.samples import Request, Rollout, Sample, SamplingParams, TeacherTargets

DEVICE = torch.device(sys.argv[4] if len(sys.argv) > 4 else "cpu")
CUDA = DEVICE.type == "cuda"
LENGTH, ROWS, PROMPT = 128, 6, 32
LONG, MANY, BUDGET = 512, 32, 2048  # of a crowd: tokens of a row, rows, tokens that a pass may have
SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 4096,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CROWDS = {
    "in pieces": ("llama", SMALL),
    "many heads share keys": (
        "llama",
        {**SMALL, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 32},
    ),
    "never in pieces": (
        "llama",
        {**SMALL, "intermediate_size": 2048, "rope_parameters": ROPE, "max_position_embeddings": LONG},
    ),
}


def rollouts(vocab: int) -> list[Rollout]:
    rng = np.random.Generator(np.random.PCG64(0))
    n = LENGTH - PROMPT
    return [
        Rollout(
            key=i,
            token_ids=rng.integers(4, vocab, size=LENGTH).astype(np.int32),
            prompt_length=PROMPT,
            loss_mask=np.ones(n, dtype=bool),
            logprobs=np.full(n, -5.0, dtype=np.float32),
            spans=[(0, 0, n)],
            finish="length",
        )
        for i in range(ROWS)
    ]


def learn(pair: Path, how: str) -> memory.Use:
    """Two steps, since gradients and states are made in the first."""
    config, theirs = (hf.load_config(str(pair / m), "m") for m in ("student", "teacher"))
    vocab, compute = hf.vocab_size(config), torch.bfloat16 if how in ("mixed", "lora") else torch.float32
    section = Learner(micro_tokens=2 * LENGTH, activation_checkpointing=how == "checkpointed")
    cfg = kit.config(
        vocab=vocab,
        longest=LENGTH,
        micro_tokens=section.micro_tokens,
        activation_checkpointing=section.activation_checkpointing,
        compute_dtype=compute,
    )
    if compute != torch.float32:  # it then runs under FSDP
        kit.own_group(Path(tempfile.mkdtemp()))
    model, trainable = hf.load_model(str(pair / "student"), "m", torch.float32), None
    if how == "lora":
        lora.add_adapters(model, 32, 64.0, "all-linear", 0, compute)
        trainable = sum(tensor.numel() for _, tensor in lora.adapters(model))
    head = hf.load_head(str(pair / "teacher"), "m", compute)
    learner = FsdpLearner(model, [head], cfg, DEVICE, 0, 1)
    width = hf.hidden_width(theirs)
    targets = [
        TeacherTargets("hidden", hidden=torch.randn(LENGTH - PROMPT, width, dtype=compute))
        for _ in range(ROWS)
    ]
    samples = [Sample(r, t, 0) for r, t in zip(rollouts(vocab), targets, strict=True)]
    for step in range(2):
        learner.train(step, samples)
    return memory.learner(
        section,
        shapes(config),
        [shapes(theirs)],
        world=1,
        compute=compute,
        cuda=CUDA,
        tokens=ROWS * LENGTH,
        longest=LENGTH,
        trainable=trainable,
        head_dtype=compute,
    )


def judge(pair: Path, dtype: torch.dtype) -> memory.Use:
    config = hf.load_config(str(pair / "teacher"), "m")
    model = hf.load_model(str(pair / "teacher"), "m", dtype)
    section = Teacher(model="m", micro_tokens=8 * LENGTH, batch_samples=ROWS)
    teacher = TransformersTeacher(model, DEVICE, 1, section.micro_tokens, hf.vocab_size(config), LENGTH)
    width = hf.hidden_width(config)
    targets = [
        TeacherTargets("hidden", hidden=torch.empty(LENGTH - PROMPT, width, dtype=dtype)) for _ in range(ROWS)
    ]
    for _ in range(2):
        teacher.score(rollouts(hf.vocab_size(config)), targets)
    return memory.teacher(
        section, shapes(config), world=1, dtype=dtype, cuda=CUDA, longest=LENGTH, log_probs=False
    )


def generate(pair: Path, dtype: torch.dtype) -> memory.Use:
    config = hf.load_config(str(pair / "student"), "m")
    sampler = on_weights(str(pair / "student"), dtype, DEVICE, ROWS)
    params = SamplingParams(max_new_tokens=LENGTH - PROMPT)
    prompts = [r.token_ids[:PROMPT] for r in rollouts(hf.vocab_size(config))]
    sampler.submit([Request(i, ids, i, params) for i, ids in enumerate(prompts)])
    weights = list(sampler.model.state_dict().items())
    for step in range(LENGTH):
        if not sampler.busy:
            break
        if step == LENGTH - PROMPT - 4:
            sampler.load(1, weights)  # an update in mid-rollout: everything is read again
        sampler.step()
    return memory.sampler(
        Sampler(max_new_tokens=LENGTH - PROMPT, concurrency=ROWS),
        shapes(config),
        dtype=dtype,
        cuda=CUDA,
        longest=LENGTH,
    )


def crowd(how: str) -> memory.Use:
    """All rows are read at their start, and again after an update when they are almost of full length."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, sizes = CROWDS[how]
    config = CONFIG_MAPPING[kind](**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    rope.by_sequence(model)
    rules = hf.TokenRules(frozenset(), 0)
    sampler = TransformersSampler(model, rules, DEVICE, MANY, prefill_tokens=BUDGET)
    rng, params = np.random.Generator(np.random.PCG64(0)), SamplingParams(max_new_tokens=8)
    # of two lengths: the shorter ones are padded, and so all are masked
    prompts = [rng.integers(1, 512, size=LONG - 8 - i % 2).astype(np.int32) for i in range(MANY)]
    sampler.submit([Request(i, ids, i, params) for i, ids in enumerate(prompts)])
    weights = [(name, tensor.clone()) for name, tensor in sampler.model.state_dict().items()]
    for step in range(8):
        if step == 6:
            sampler.load(1, weights)
        sampler.step()
    section = Sampler(max_new_tokens=8, concurrency=MANY, prefill_tokens=BUDGET)
    return memory.sampler(section, shapes(config), dtype=torch.float32, cuda=CUDA, longest=LONG)


def most() -> int:
    """Bytes that this process has held at most, of its device or of main memory."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


if __name__ == "__main__":
    torch.set_num_threads(1)
    pair, role, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if role == "learner":
        use = learn(pair, what)
    elif role == "crowd":
        use = crowd(what)
    else:
        use = (judge if role == "teacher" else generate)(pair, getattr(torch, what))
    predicted = use.peak - sum(p.nbytes for p in use.always if CUDA and "estimate" in p.what)
    found = {"measured": most(), "predicted": predicted, "parts": memory.largest(use.parts, 9)}
    print(json.dumps({**found, "reserved": torch.cuda.max_memory_reserved() if CUDA else None}))
