#!/usr/bin/env python3
"""Synchronous on-policy distillation in forty lines of plain PyTorch: what any framework must beat.

    python benchmarks/plain_loop.py PAIR QUESTIONS [--steps 20] [--batch 16] [--tokens 64] [--lr 1e-4]
        [--every 5]

transformers generates, the loss is the token mean of the exact reverse KL, AdamW with PyTorch's defaults;
bf16 models, fp32 masters. Prints a row of JSON per step, and one every `--every` steps with the KL on
held-out questions; the clock is stopped while that is measured. `--lag N` trains on the rollouts of N steps
before, and `--clip`, `--betas` and `--decay` set the optimizer: an independent reference for what a lag does,
without any of fopd's code.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HELD_OUT = 32  # questions, the first of the file; the others are trained on
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(pair: Path, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.bfloat16).to(DEVICE).eval()


def questions(file: Path) -> list[str]:
    return [json.loads(line)["question"] for line in file.read_text().splitlines()]


def shown(tokenizer: Any, asked: list[str]) -> list[str]:
    """Questions in the chat template, with the assistant's turn begun."""
    talks = [[{"role": "user", "content": q}] for q in asked]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in talks]


def generate(student: Any, tokenizer: Any, asked: list[str], tokens: int) -> dict[str, torch.Tensor]:
    """A batch of answers: ids and mask `(n, width)`, which of the last `tokens` positions are answer, EOS
    included.
    """
    texts = shown(tokenizer, asked)
    prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(DEVICE)
    with torch.no_grad():
        ids = student.generate(
            **prompts, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
    width = prompts["input_ids"].shape[1]
    ended = (ids[:, width:] == tokenizer.eos_token_id).int()
    answer = ended.cumsum(1) - ended == 0
    return {"ids": ids, "mask": torch.cat([prompts["attention_mask"], answer.long()], 1), "answer": answer}


def logprobs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs `(answer tokens, V)`, in fp32."""
    positions = (batch["mask"].cumsum(-1) - 1).clamp(min=0)
    hidden = model.model(
        input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=positions, use_cache=False
    )
    before = hidden.last_hidden_state[:, -batch["answer"].shape[1] - 1 : -1]
    return torch.log_softmax(model.lm_head(before[batch["answer"]]).float(), -1)


def divergence(kind: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if kind == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "jsd":
        mixture = torch.logaddexp(student, teacher) - math.log(2.0)
        return 0.5 * ((teacher.exp() * (teacher - mixture)) + student.exp() * (student - mixture)).sum(-1)
    return (student.exp() * (student - teacher)).sum(-1)


class Clock:
    """Seconds of training, and the rows that are printed."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, time.perf_counter()

    def row(self, **values: Any) -> None:
        self.pause()
        print(json.dumps({**values, "seconds": self.seconds}), flush=True)
        self.go_on()

    def pause(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began

    def go_on(self) -> None:
        self._began = time.perf_counter()

    def evaluation(
        self, step: int, student: Any, teacher: Any, tokenizer: Any, asked: list[str], tokens: int
    ) -> None:
        """Print a row with the reverse KL per token on fresh answers to held-out questions, always with the
        same randomness.
        """
        self.pause()
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            kl = self._kl(student, teacher, tokenizer, asked, tokens)
        print(json.dumps({"kind": "eval", "step": step, "kl": kl, "seconds": self.seconds}), flush=True)
        self.go_on()

    @staticmethod
    def _kl(student: Any, teacher: Any, tokenizer: Any, asked: list[str], tokens: int) -> float:
        total, count = 0.0, 0
        for start in range(0, len(asked), 16):
            with torch.no_grad():
                batch = generate(student, tokenizer, asked[start : start + 16], tokens)
                kl = divergence("reverse_kl", logprobs(student, batch), logprobs(teacher, batch))
            total, count = total + float(kl.sum()), count + len(kl)
        return total / count


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "student", padding_side="left")
    student, teacher = load(args.pair, "student"), load(args.pair, "teacher")
    asked = questions(args.questions)
    held_out, asked = asked[:HELD_OUT], asked[HELD_OUT:]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(args.seed)).tolist()
    masters = [p.detach().float().requires_grad_(True) for p in student.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=args.lr, betas=args.betas)
    rollouts: deque[dict[str, torch.Tensor]] = deque()
    drawn, clock = 0, Clock()
    evaluate: Callable[[int], None] = lambda step: clock.evaluation(  # noqa: E731
        step, student, teacher, tokenizer, held_out, args.tokens
    )
    evaluate(0)
    for step in range(args.steps):
        while len(rollouts) <= args.lag:
            own = [asked[order[(drawn + i) % len(order)]] for i in range(args.batch)]
            rollouts.append(generate(student, tokenizer, own, args.tokens))
            drawn += args.batch
        batch = rollouts.popleft()
        with torch.no_grad():
            target = logprobs(teacher, batch)
        now = logprobs(student, batch)
        divergence(args.kind, now, target).mean().backward()
        for master, p in zip(masters, student.parameters(), strict=True):
            master.grad, p.grad = p.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, args.clip or torch.inf)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps if args.decay == "linear" else 1)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, student.parameters(), strict=True):
                p.copy_(master)
        kl = float(divergence("reverse_kl", now.detach(), target).mean())
        clock.row(kind="step", step=step + 1, kl=kl, grad_norm=float(norm), tokens=int(batch["answer"].sum()))
        if (step + 1) % args.every == 0:
            evaluate(step + 1)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("pair", type=Path, help="directory with student/ and teacher/")
    found.add_argument("questions", type=Path, help="jsonl file with a column question")
    found.add_argument("--steps", type=int, default=20)
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--tokens", type=int, default=64)
    found.add_argument("--lr", type=float, default=1e-4)
    found.add_argument("--every", type=int, default=5)
    found.add_argument("--seed", type=int, default=0)
    return found


def main() -> None:
    found = parser()
    found.add_argument("--lag", type=int, default=0)
    found.add_argument("--kind", choices=("reverse_kl", "forward_kl", "jsd"), default="reverse_kl")
    found.add_argument("--clip", type=float, default=0.0, help="gradient norm; 0: none")
    found.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.999))
    found.add_argument("--decay", choices=("constant", "linear"), default="constant")
    train(found.parse_args())


if __name__ == "__main__":
    main()
