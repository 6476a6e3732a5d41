"""Prompts and graders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_kit import built

from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt
from fopd_cli.tasks import load_task
from fopd_cli.tasks.arithmetic import solve, worked
from fopd_cli.tasks.math import Math


def test_arithmetic_is_right_step_by_step() -> None:
    assert solve("7+5-9*3=") == (["7+5=2", "2-9=3", "3*3=9"], "9")
    assert worked("7+5-9=") == "7+5=2,2-9=3.3"


@given(st.integers(2, 8), st.sampled_from([1, 2, 3]))
def test_arithmetic_answers_are_pythons(horizon: int, difficulty: int) -> None:
    task = built("arithmetic", horizon=horizon, difficulty=difficulty, train_prompts=30, eval_prompts=10)
    for prompt in task.prompts("train"):
        assert prompt.text
        value, rest = int(prompt.text[0]), prompt.text[1:-1]
        for operator, digit in zip(rest[::2], rest[1::2], strict=True):
            value = eval(f"({value}{operator}{digit}) % 10")
        assert prompt.payload["answer"] == str(value)
        assert task.grade(prompt, worked(prompt.text)) == 1
        assert task.grade(prompt, worked(prompt.text)[:-1] + str((value + 1) % 10)) == 0


def test_arithmetic_holds_out_what_it_evaluates_on() -> None:
    task = built("arithmetic", horizon=2)
    train, held_out = ({p.text for p in task.prompts(split)} for split in ("train", "eval"))
    assert len(held_out) == 256
    assert not train & held_out
    assert task.prompts("eval") == built("arithmetic", horizon=2, train_prompts=7).prompts("eval")


def test_arithmetic_refuses_more_questions_than_exist() -> None:
    with pytest.raises(UserError, match=r"raise task\.horizon"):
        built("arithmetic", horizon=1, eval_prompts=150)


@pytest.mark.parametrize("garbage", ["", "....", "\x00", "1e999999", "=" * 10_000, "\ud800"])
def test_graders_survive_anything(garbage: str, tmp_path: Path) -> None:
    assert built("arithmetic").grade(Prompt(0, text="1+1=", payload={"answer": "2"}), garbage) == 0
    assert math_task(tmp_path).grade(Prompt(0, payload={"answer": "72"}), garbage) == 0


def math_task(folder: Path, **options: object) -> Math:
    rows = [{"question": f"What is {i}+1?", "answer": f"Add.\n#### {i + 1}"} for i in range(10)]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return built("math", train=str(path), eval=str(path), eval_prompts=4, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "response", "grade"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "so the answer is \\boxed{72}", 1),
        ("#### 72", "#### 72", 1),
        ("#### 1,000", "The result is 1000.", 1),
        ("\\frac{1}{2}", "We get $\\boxed{0.5}$", 1),
        ("72", "72", 1),
        ("72", "I think it is 71", 0),
        ("x^2+1", "\\boxed{1+x^2}", 1),
    ],
)
def test_math_grades(tmp_path: Path, gold: str, response: str, grade: float) -> None:
    assert math_task(tmp_path).grade(Prompt(0, payload={"answer": gold}), response) == grade


def test_math_never_trains_on_what_it_holds_out(tmp_path: Path) -> None:
    task = math_task(tmp_path)
    train, held_out = ([p.messages[-1]["content"] for p in task.prompts(s)] for s in ("train", "eval"))  # type: ignore[index]
    assert len(held_out) == 4
    assert len(train) == 6
    assert not set(train) & set(held_out)


def test_math_takes_nested_columns_and_chat_messages(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    messages = [{"role": "user", "content": "What is 1+1?"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "2"}}
    train.write_text((json.dumps(row) + "\n") * 3)
    held_out.write_text(json.dumps({"problem": "What is 2+2?", "answer": "4"}) + "\n")
    task = built(
        "math",
        train=str(train),
        eval=str(held_out),
        question="prompt",
        answer="reward_model.ground_truth",
        eval_question="problem",
        eval_answer="answer",
        template="Q: {question}",
    )
    (only,) = task.prompts("train")
    assert only.messages == messages
    assert task.grade(only, "\\boxed{2}") == 1
    assert task.prompts("eval")[0].messages == [{"role": "user", "content": "Q: What is 2+2?"}]


def test_math_without_answers_grades_nothing(tmp_path: Path) -> None:
    assert math.isnan(math_task(tmp_path, answer=None).grade(Prompt(0), "72"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("", "has no rows"),
        ("{nonsense", "line 1 of .* is not JSON"),
        ("[1]", "line 1 of .* is not a JSON object"),
        (
            '{"problem": "x", "answer": "1"}',
            r"row 1 of .* has no column 'question'; it has \['answer', 'problem'\]; set task.question",
        ),
        ('{"question": "x"}', "no column 'answer'"),
    ],
)
def test_math_names_what_is_wrong_with_a_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "q.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        built("math", train=str(path), eval=str(path)).prompts("eval")


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from fopd_cli.samples import Prompt\nclass Echo:\n    def __init__(self, n): self.n = n\n"
        "    def prompts(self, split): return [Prompt(i, text='x') for i in range(self.n)]\n    def "
        "grade(self, prompt, response): return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load_task("mine:Echo", {"n": 3}).prompts("train")) == 3
    for name, options, message in (
        ("mine:Echo", {}, "does not take these options"),
        ("mine:Nothing", {}, "cannot import"),
        ("nowhere:Echo", {}, "cannot import"),
        ("collections:OrderedDict", {}, "has no method prompts"),
    ):
        with pytest.raises(UserError, match=message):
            load_task(name, options)
