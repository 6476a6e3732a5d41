#!/usr/bin/env python3
"""The same run by TRL's DistillationTrainer: python benchmarks/trl_loop.py PAIR QUESTIONS [...], like
plain_loop.py.

Same pair, questions, batch, lengths and learning rate, constant; reverse KL; bf16 by autocast over fp32
weights, the teacher in bf16; no clipping; generation by transformers. Evaluations are plain_loop.py's, and
the clock is stopped during them, too.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from plain_loop import HELD_OUT, Clock, load, parser, questions
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Rows(TrainerCallback):
    """Prints plain_loop.py's rows."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, held_out: list[str]) -> None:
        self.args, self.tokenizer, self.held_out = args, tokenizer, held_out
        self.teacher = load(args.pair, "teacher")
        self.clock = Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.clock.go_on()
        self._evaluate(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.clock.row(kind="step", step=state.global_step)
        if state.global_step % self.args.every == 0:
            self._evaluate(state.global_step, model)

    def _evaluate(self, step: int, model: Any) -> None:
        self.clock.pause()
        copy = load(self.args.pair, "student")
        copy.load_state_dict(model.state_dict())  # in bf16, as it would be served
        self.clock.go_on()
        self.clock.evaluation(step, copy, self.teacher, self.tokenizer, self.held_out, self.args.tokens)


def main() -> None:
    args = parser().parse_args()
    asked = questions(args.questions)
    prompts = [{"prompt": [{"role": "user", "content": q}]} for q in asked[HELD_OUT:]]
    tokenizer = AutoTokenizer.from_pretrained(args.pair / "student", padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": "float32"},
            teacher_model_init_kwargs={"dtype": "bfloat16"},
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            max_steps=args.steps,
            max_completion_length=args.tokens,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            beta=1.0,
            temperature=1.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=args.seed,
        )
        DistillationTrainer(
            model=str(args.pair / "student"),
            teacher_model=str(args.pair / "teacher"),
            args=config,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(prompts),
            callbacks=[Rows(args, tokenizer, asked[:HELD_OUT])],
        ).train()


if __name__ == "__main__":
    main()
