"""What is held out where nobody says what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from task_kit import built

from fopd_cli.errors import UserError


def rows(path: Path, count: int, first: int = 0, **more: Any) -> str:
    lines = [{"question": f"{i}+1?", "answer": str(i + 1), **more} for i in range(first, first + count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def asked(task: Any, split: str) -> set[str]:
    return {p.messages[-1]["content"] for p in task.prompts(split)}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (40, 4), (5000, 256)])
def test_a_tenth_of_the_data_and_no_more_than_256(tmp_path: Path, count: int, held_out: int) -> None:
    path = rows(tmp_path / "q.jsonl", count)
    for task in (
        built("chat", train=path, question="question"),
        built("math", train=path),
        built("tool", train=path, sandbox="none"),
        built("chat", train=path, eval=path, question="question"),
    ):
        ours, train = asked(task, "eval"), asked(task, "train")
        assert (len(ours), len(train)) == (held_out, count - held_out)
        assert not ours & train
        assert [p.index for p in task.prompts("eval")] == list(range(held_out))
    note = (
        f"task.eval: not given; {held_out} of the {count} questions of task.train are held out, drawn "
        "by their text"
    )
    asked(task := built("math", train=path), "train")
    assert note in task.notices


def test_which_ones_depends_neither_on_their_order_nor_on_what_is_added(tmp_path: Path) -> None:
    before = asked(built("math", train=rows(tmp_path / "a.jsonl", 200), eval_prompts=20), "eval")
    text = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(text)) + "\n")
    assert asked(built("math", train=str(tmp_path / "b.jsonl"), eval_prompts=20), "eval") == before
    more = asked(built("math", train=rows(tmp_path / "c.jsonl", 220), eval_prompts=20), "eval")
    assert len(more & before) >= 12


def test_only_questions_with_an_answer_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    text = rows(path, 10) and path.read_text()
    path.write_text(
        text + "".join(json.dumps({"question": f"{i}?", "answer": None}) + "\n" for i in range(90))
    )
    task = built("math", train=str(path), eval_prompts=5)
    assert all(p.payload["answer"] for p in task.prompts("eval"))
    assert len(task.prompts("train")) == 95
    path.write_text('{"question": "why?", "answer": null}\n{"question": "how?", "answer": null}\n')
    with pytest.raises(UserError, match="so none can be held out to be graded"):
        built("math", train=str(path)).prompts("eval")


def test_a_file_of_its_own_is_used_up_to_256(tmp_path: Path) -> None:
    train, own = rows(tmp_path / "t.jsonl", 40), rows(tmp_path / "e.jsonl", 300, first=100)
    assert len(asked(built("math", train=train, eval=own), "eval")) == 256
    assert (
        len(asked(built("math", train=train, eval=rows(tmp_path / "few.jsonl", 7, first=100)), "eval")) == 7
    )
    assert len(asked(built("math", train=train, eval=own), "train")) == 40


def test_instances_of_the_swe_task_are_held_out_by_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "i.jsonl"
    made = [
        {
            "instance_id": f"a__b-{i}",
            "problem_statement": "p",
            "FAIL_TO_PASS": ["t.py::a"],
            "PASS_TO_PASS": [],
            "files": {"a.py": ""},
        }
        for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    task = built("swe", train=str(path), sandbox="none")
    ours, train = ({i.id for i in task.instances(split)} for split in ("eval", "train"))  # type: ignore[arg-type]
    assert (len(ours), len(train), ours & train) == (3, 27, set())
    assert "3 of the 30 instances" in task.notices[0]
