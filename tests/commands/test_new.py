"""`fopd new`: a working recipe for the user's models and data, or one line that says why there is none."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, Fopd
from pair_kit import changed, exchanged

from fopd_cli.errors import UserError
from fopd_cli.new import data, models, recipe
from fopd_cli.new.write import write
from fopd_cli.recipe import load_recipe

STUDENT, TEACHER = str(TINY / "student"), str(TINY / "teacher")


def file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(folder: Path, count: int = 40, **columns: Any) -> str:
    return file(folder, *({"question": f"{i}+{i + 1}=", **columns} for i in range(count)))


def quiet(line: str) -> None: ...


@pytest.mark.parametrize(
    ("row", "question", "answer", "task"),
    [
        ({"question": "1+1=", "answer": "2"}, "question", "answer", "math"),
        ({"question": "1+1=", "answer": "One and one are #### 2"}, "question", "answer", "math"),
        ({"Problem": "1+1=", "solution": "It is \\boxed{2}."}, "Problem", "solution", "math"),
        (
            {"prompt": "1+1=", "reward_model": {"ground_truth": "2"}},
            "prompt",
            "reward_model.ground_truth",
            "math",
        ),
        ({"instruction": "Say hello.", "output": "Hello there."}, "instruction", None, "chat"),
        (
            {
                "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
                "id": 7,
            },
            "messages",
            None,
            "chat",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            "conversations",
            None,
            "chat",
        ),
        ({"id": 3, "anfrage": "Was ist das?"}, "anfrage", None, "chat"),
    ],
)
def test_columns_are_found(
    tmp_path: Path, row: dict[str, Any], question: str, answer: str | None, task: str
) -> None:
    found = data.look(file(tmp_path, *[row] * 3))
    assert (found.question, found.answer, found.task) == (question, answer, task)


def test_columns_that_are_named_or_unclear(tmp_path: Path) -> None:
    rows = file(tmp_path, {"a": "one text", "b": "another text", "mark": "5"})
    with pytest.raises(
        UserError, match=r"unclear which column .* \['a', 'b', 'mark'\]; name it with --question"
    ):
        data.look(rows)
    named = data.look(rows, "b", "mark")
    assert (named.question, named.answer) == ("b", "mark")
    with pytest.raises(UserError, match="has no column 'c'"):
        data.look(rows, "c")


def test_lengths_come_from_the_data(tmp_path: Path) -> None:
    """The tiny tokenizer has a token per byte: a 100-byte response needs 150, rounded up to 192."""
    talks = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y" * 100}]}
        for n in (10, 20, 30)
    ]
    student = models.look(STUDENT, "--student")
    found = data.look(file(tmp_path, *talks))
    lengths = recipe.measure(found, student, chat=True)
    assert lengths.response == 100
    assert 30 < lengths.prompt <= 40
    text, assumed = recipe.text(tmp_path, student, models.look(TEACHER, "--teacher"), found, devices=0)
    assert "max_new_tokens: 192" in text
    assert any("have at most 100" in line for line in assumed)


@pytest.mark.parametrize("columns", [{}, {"answer": "3"}])
def test_what_is_written_passes_doctor_and_says_why(tmp_path: Path, columns: dict[str, str]) -> None:
    said: list[str] = []
    path, findings = write(
        tmp_path / "new", STUDENT, TEACHER, sums(tmp_path, **columns), None, None, said.append
    )
    assert [f for f in findings if f.level != "note"] == []
    parsed = load_recipe(path)
    assert parsed.student.model == STUDENT
    assert parsed.task.name == ("math" if columns else "chat")
    lines = path.read_text().splitlines()
    assert len(lines) <= 25
    assert sum("#" in line for line in lines) >= 8
    assert any("learning rate 0.0001" in line for line in said)
    with pytest.raises(UserError, match="is there already"):
        write(tmp_path / "new", STUDENT, TEACHER, sums(tmp_path), None, None, quiet)


def test_a_pair_that_is_none(tmp_path: Path) -> None:
    other = str(changed(tmp_path, "teacher", tokenizer=exchanged("a", "b")))
    with pytest.raises(UserError, match="different tokenizers: 2 of"):
        write(tmp_path / "new", STUDENT, other, sums(tmp_path), None, None, quiet)
    assert not (tmp_path / "new").exists()


def test_the_command_without_a_terminal(fopd: Fopd, tmp_path: Path) -> None:
    assert "--teacher, --data: not given" in fopd("new", "--student", STUDENT, code=2).err
    assert "fopd new writes one" in fopd("run", code=2).err
    done = fopd("new", "here", "--student", STUDENT, "--teacher", TEACHER, "--data", sums(tmp_path))
    assert "ready; next: fopd run here/recipe.yaml" in done.out
    assert "assumed: " in done.err


def test_what_flags_leave_open_is_asked(tmp_path: Path) -> None:
    """At a terminal, with models and data in the folder: Enter takes the smallest model, the largest, and the
    file.
    """
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(TINY / name)
    sums(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fopd_cli", "new", "made"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.write(ours, b"\n\n\n")
        out, _ = process.communicate(timeout=120)
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 0
    assert b"ready" in out
    parsed = load_recipe(tmp_path / "made" / "recipe.yaml")
    assert Path(parsed.student.model).name == "student"
    assert Path(parsed.teachers[0].model).name == "teacher"
