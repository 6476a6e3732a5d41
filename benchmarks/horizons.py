#!/usr/bin/env python3
"""Two small tasks for the staleness benchmark, besides the quickstart's arithmetic, and pairs of a teacher
that can nearly do them and a student that hardly can.

    python benchmarks/horizons.py      makes benchmarks/pairs/lookups and benchmarks/pairs/recurrence again

`Lookups` (middle horizon): `bfd=`; the student asks for each letter's value in a turn of its own (`b?`,
observation `7`), then adds them modulo 10 in writing. Each question has its own values, so they cannot be
memorized, and they may change with the student's version. `Recurrence` (long horizon): `4071=`, to be
continued by 24 digits, each the sum modulo 10 of the last and the fourth last; right only if all digits are.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from fopd_cli.samples import Prompt
from fopd_cli.tasks.base import Observation

HERE = Path(__file__).resolve().parent
LETTERS = "abcdefgh"
CALLS = 3
FURTHER = 24


class Lookups:
    """`drift`: the probability that a training question's values change from one version of the student to
    the next. `outage`: the probability that a training question cannot be looked up at a version, which ends
    its conversation.
    """

    def __init__(
        self, drift: float = 0.0, outage: float = 0.0, train_prompts: int = 4000, eval_prompts: int = 128
    ) -> None:
        self.drift, self.outage = drift, outage
        self.sizes = {"train": train_prompts, "eval": eval_prompts}

    def prompts(self, split: Literal["train", "eval"]) -> list[Prompt]:
        rng = random.Random(f"lookups/{split}")
        questions = ["".join(rng.choice(LETTERS) for _ in range(CALLS)) for _ in range(self.sizes[split])]
        return [Prompt(index=i, text=f"{q}=", payload={"split": split}) for i, q in enumerate(questions)]

    def grade(self, prompt: Prompt, response: str) -> float:
        """Whether the sum is right for the values at version 0, which held-out questions always keep."""
        return float(response.rpartition(".")[2] == added(self.values(prompt, 0))[1])

    def episode(self, prompt: Prompt, now: int) -> _Asking:
        return _Asking(self, prompt, now)

    def down(self, prompt: Prompt, now: int) -> bool:
        split = prompt.payload["split"]
        return split == "train" and random.Random(f"outage/{prompt.index}/{now}").random() < self.outage

    def value(self, prompt: Prompt, letter: str, now: int) -> int:
        split = prompt.payload["split"]
        moves = range(1, now + 1) if split == "train" and self.drift else ()
        epoch = sum(random.Random(f"{prompt.index}/{v}").random() < self.drift for v in moves)
        return random.Random(f"{split}/{prompt.index}/{letter}/{epoch}").randrange(10)

    def values(self, prompt: Prompt, now: int) -> list[int]:
        return [self.value(prompt, letter, now) for letter in (prompt.text or "").removesuffix("=")]


class _Asking:
    def __init__(self, task: Lookups, prompt: Prompt, now: int) -> None:
        self.task, self.prompt, self.now, self.calls = task, prompt, now, 0

    async def observe(self, turn: str) -> Observation:
        self.calls += 1
        if len(turn) != 2 or turn[1] != "?" or self.calls > CALLS or self.task.down(self.prompt, self.now):
            return Observation(None)
        value = str(self.task.value(self.prompt, turn[0], self.now))
        return Observation(
            value, calls=[{"tool": "lookup", "input": turn, "output": value, "ok": True, "seconds": 0.0}]
        )

    async def close(self) -> None:
        pass


def added(values: list[int]) -> tuple[str, str]:
    """An expert's last turn, and the sum."""
    total, steps = values[0], []
    for value in values[1:]:
        steps.append(f"{total}+{value}={(total + value) % 10}")
        total = (total + value) % 10
    return f"{','.join(steps)}.{total}", str(total)


class Recurrence:
    def __init__(self, train_prompts: int = 6000, eval_prompts: int = 128) -> None:
        self.sizes = {"train": train_prompts, "eval": eval_prompts}

    def prompts(self, split: Literal["train", "eval"]) -> list[Prompt]:
        """Distinct beginnings; the held-out ones are drawn first."""
        everything = [f"{i:04d}" for i in range(10_000)]
        random.Random("recurrence").shuffle(everything)
        held_out = self.sizes["eval"]
        chosen = (
            everything[:held_out]
            if split == "eval"
            else everything[held_out : held_out + self.sizes["train"]]
        )
        return [Prompt(index=i, text=f"{c}=", payload={"answer": continued(c)}) for i, c in enumerate(chosen)]

    def grade(self, prompt: Prompt, response: str) -> float:
        return float(response == prompt.payload["answer"])


def continued(beginning: str) -> str:
    digits = [int(d) for d in beginning]
    for _ in range(FURTHER):
        digits.append((digits[-1] + digits[-4]) % 10)
    return "".join(map(str, digits[4:]))


# ---- the pairs: worked solutions as pieces (text, whether it is to be learned) -----------------------------


def lookups_solved(rng: random.Random, step: int) -> Iterable[tuple[str, bool]]:
    letters, values = [rng.choice(LETTERS) for _ in range(CALLS)], [rng.randrange(10) for _ in range(CALLS)]
    yield f"{''.join(letters)}=", False
    for letter, value in zip(letters, values, strict=True):
        yield from ((f"{letter}?<eos>", True), (str(value), False))
    yield f"{added(values)[0]}<eos>", True


def recurrence_solved(rng: random.Random, step: int) -> Iterator[tuple[str, bool]]:
    beginning = f"{rng.randrange(10_000):04d}"
    yield f"{beginning}=", False
    yield f"{continued(beginning)}<eos>", True


def main() -> None:
    sys.path.insert(0, str(HERE.parent / "scripts"))
    import make_tiny_pair

    for name, solved, student_loss in (
        ("lookups", lookups_solved, 0.12),
        ("recurrence", recurrence_solved, 0.1),
    ):

        def examples(rng: random.Random, step: int, solved: Any = solved) -> list[tuple[str, bool]]:
            return list(solved(rng, step))

        make_tiny_pair.make_pair(
            HERE / "pairs" / name, examples, teacher_loss=0.001, student_loss=student_loss
        )


if __name__ == "__main__":
    main()
