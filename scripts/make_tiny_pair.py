#!/usr/bin/env python3
"""Make a tiny teacher and a tinier student with one byte-level tokenizer, in Hugging Face format.

    scripts/make_tiny_pair.py OUT [--task arithmetic|swe|tool] [--arch ARCHITECTURE] [--untrained]
        [--teacher-loss X] [--student-loss X]

The teacher learns the task from worked solutions until it is nearly perfect; the student gets only a few
steps, enough to know the format and to be wrong most of the time. `recipes/tiny/` was made by this script
with its defaults (about 40 seconds on two cores), `recipes/tiny-tool/` with `--task tool --student-loss 0.2`,
`recipes/tiny-swe/` with `--task swe --teacher-steps 300 --teacher-loss 0 --student-loss 0.11`. The pair has a
chat template, so that it can replace real models wherever one is needed.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fopd_cli.recipe import ToolTask
from fopd_cli.tasks import load_task
from fopd_cli.tasks.arithmetic import worked
from fopd_cli.tasks.swe.generated import instances
from fopd_cli.tasks.swe.generated import scripted as scripted_fix
from fopd_cli.tasks.tool import Calculations, scripted

# What is special to each architecture, small enough for samples to exceed it; shared sizes are in
# `make_model`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {},
    "gemma3_text": {  # windows; a soft cap on logits
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "qwen3_5_text": {  # gated delta networks, which keep a state, between layers of attention
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "granite": {  # multipliers, one of them for the logits
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
MAX_STEPS = 3000
END = "<eos>"
SPECIALS = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{{ m['content'] }}<eos>{% else "
    "%}<user>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> Any:
    """Bytes and four special tokens: any text survives the round trip unchanged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(arch: str, vocabulary: int, hidden: int, layers: int, seed: int) -> Any:
    """Head dimension 32, the smallest that every engine we support can run."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": max(1, hidden // 64),
        "head_dim": 32,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,  # at the usual 0.02 a model this narrow needs ten times the steps
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(arch, **{**sizes, **ARCHITECTURES[arch]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


class Arithmetics:
    """Worked solutions of the arithmetic task, as pieces (text, whether the model is to learn it).

    Step s trains on questions of one horizon, 2 .. `horizon` in turn: from long ones only, a model this
    small often never finds out which digits belong together.
    """

    def __init__(self, horizon: int) -> None:
        self.prompts = {
            h: load_task("arithmetic", {"horizon": h, "eval_prompts": 8}).prompts("train")
            for h in range(2, horizon + 1)
        }

    def __call__(self, rng: random.Random, step: int) -> list[tuple[str, bool]]:
        question = rng.choice(self.prompts[2 + step % len(self.prompts)]).text or ""
        return [(question, False), (worked(question) + END, True)]


class BugFixes:
    """Episodes of an expert coding agent, as the scaffold of `recipes/swe-tiny.yaml` shows them."""

    def __init__(self) -> None:
        self.instances = instances("train", 20_000, seed=0, held_out=256)

    def __call__(self, rng: random.Random, step: int) -> list[tuple[str, bool]]:
        made = rng.choice(self.instances)
        pieces = [(f"{made.problem}\n", False)]
        for command, output in scripted_fix(made):
            pieces += [(f"```sh\n{command}\n```{END}", True), (f"\n0\n{output}", False)]
        return pieces[:-1]


class ToolCalls:
    """Episodes of an expert with a Python interpreter."""

    def __init__(self) -> None:
        self.prompts = Calculations(ToolTask(name="tool")).prompts("train")

    def __call__(self, rng: random.Random, step: int) -> list[tuple[str, bool]]:
        question = rng.choice(self.prompts).text or ""
        call, observation, answer = scripted(question)
        return [(question, False), (call + END, True), (observation, False), (answer + END, True)]


def encoded(tokenizer: Any, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Token ids, and labels with -100 for what is not to be learned."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in pieces:
        own = tokenizer(text)["input_ids"]
        ids += own
        labels += own if learnt else [-100] * len(own)
    return ids, labels


def pretrain(
    model: Any,
    tokenizer: Any,
    examples: Any,
    target: float,
    seed: int,
    steps: int | None,
    lr: float = 4e-3,
    batch: int = 64,
) -> int:
    """Next-token prediction until the loss is under `target` nats per token; returns the number of steps.
    `steps` is their upper limit, over which the learning rate falls to 0.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)

    def factor(step: int) -> float:
        fall = 1.0 if steps is None else 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / 50) * fall

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    smooth, step = 10.0, 0
    while smooth > target and step < (steps or MAX_STEPS):
        rows = [encoded(tokenizer, examples(rng, step)) for _ in range(batch)]
        width = max(len(row) for row, _ in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
        logits = model(ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth, step = 0.95 * smooth + 0.05 * loss.item(), step + 1
        if step % 200 == 0:
            print(f"step {step}: {smooth:.4f} nats per token", flush=True)
    return step


def make_pair(
    out: Path,
    examples: Any,
    teacher_loss: float,
    student_loss: float,
    teacher_steps: int | None = None,
    arch: str = "qwen3",
    untrained: bool = False,
    dtype: str = "bfloat16",
) -> None:
    """Write OUT/teacher and OUT/student; `examples(rng, step)` gives worked solutions as pieces (text,
    whether it is learned).
    """
    tokenizer = make_tokenizer()
    for seed, (name, hidden, target) in enumerate(
        (("teacher", 128, teacher_loss), ("student", 96, student_loss))
    ):
        start = time.monotonic()
        model, steps = make_model(arch, len(tokenizer), hidden, 2, seed), 0
        if not untrained:
            steps = pretrain(
                model, tokenizer, examples, target, seed, teacher_steps if name == "teacher" else None
            )
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
        model.to(getattr(torch, dtype)).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{out / name}: {millions:.2f}M parameters, {steps} steps, {time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=["arithmetic", "swe", "tool"], default="arithmetic")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="qwen3")
    parser.add_argument(
        "--untrained", action="store_true", help="random weights: enough where only shapes matter"
    )
    parser.add_argument("--teacher-loss", type=float, default=0.003, help="nats per token at which to stop")
    parser.add_argument("--teacher-steps", type=int, help="let the learning rate fall to 0 over so many")
    parser.add_argument("--student-loss", type=float, default=0.3)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the saved weights"
    )
    parser.add_argument("--horizon", type=int, default=5)
    args = parser.parse_args()
    examples = {"tool": ToolCalls, "swe": BugFixes}.get(args.task, lambda: Arithmetics(args.horizon))()
    make_pair(
        args.out,
        examples,
        args.teacher_loss,
        args.student_loss,
        args.teacher_steps,
        args.arch,
        args.untrained,
        args.dtype,
    )


if __name__ == "__main__":
    main()
