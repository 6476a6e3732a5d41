"""The checks before a run: lengths, ends, tokenizers, templates; each finding blames the right thing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TINY, small_recipe
from pair_kit import changed, exchanged

from fopd_cli import doctor
from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.inputs import Inputs, load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.placement import place

SPECIALS = ("<pad>", "<eos>", "<user>", "<assistant>")  # ids 0 to 3 of the tiny pair


def questions(folder: Path, *texts: str, name: str = "q.jsonl", **columns: Any) -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"question": t, "answer": "1", **columns}) + "\n" for t in texts))
    return str(path)


def load(folder: Path, **changes: Any) -> Inputs:
    recipe = small_recipe(TINY, **{k: v for k, v in changes.items() if k != "task"})
    recipe["task"] = changes.get("task", recipe["task"])
    recipe["learner"]["batch_samples"] = 1  # some of these files hold a single question
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    parsed = load_recipe(path)
    return load_inputs(parsed, place(parsed, 0))


def found(inputs: Inputs, folder: Path) -> list[str]:
    return [str(finding) for finding in doctor.findings(inputs, folder)]


# ---- lengths -----------------------------------------------------------------------------------------------


def test_overlong_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = questions(tmp_path, "held out", "x" * 1012, "x" * 1013, "y" * 2000, "short", "shorter")
    inputs = load(tmp_path, task={"name": "math", "train": rows, "eval": rows, "eval_prompts": 1})
    stream = inputs.stream
    assert stream.kept == {"train": [0, 3, 4], "eval": [0]}  # 1012 + 2 of the template + 10 new ones are 1024
    (note,) = [f for f in found(inputs, tmp_path) if f.startswith("note")]
    assert "2 of 5 train prompts are too long and left out (task.overlong): task.train: row 3 of" in note
    assert "has 1015 tokens, with 10 new ones that is more than the context of 1024 of student.model" in note
    drawn = [stream.train_id(n).prompt for n in range(9)]
    assert all(sorted(drawn[i : i + 3]) == [0, 3, 4] for i in (0, 3, 6)), (
        "every epoch has each that is left, once"
    )
    with pytest.raises(
        UserError, match=r"^task.train: row 3 of .* \(2 of 5 train prompts are too long\); .*overlong: drop"
    ):
        load(
            tmp_path,
            task={"name": "math", "train": rows, "eval": rows, "eval_prompts": 1, "overlong": "refuse"},
        )


def test_prompts_that_stay_keep_their_random_numbers(tmp_path: Path) -> None:
    rows = questions(tmp_path, "held out", *(f"q{i}" for i in range(20)))
    more = questions(tmp_path, "held out", *(f"q{i}" for i in range(20)), "z" * 3000, name="more.jsonl")
    seeds = []
    for path in (rows, more):
        stream = load(tmp_path, task={"name": "math", "train": path, "eval": rows, "eval_prompts": 1}).stream
        drawn = sorted((stream.train_id(n) for n in range(20)), key=lambda s: s.prompt)
        seeds.append([(s.prompt, s.seed(0)) for s in drawn])
    assert seeds[0] == seeds[1]


def test_a_context_that_is_too_long_is_not_blamed_on_the_student(tmp_path: Path) -> None:
    """It only makes the teacher's prompt longer, not the student's."""
    rows = questions(tmp_path, "held out", "a", "b", hint="h" * 1500)
    task = {"name": "math", "train": rows, "eval": rows, "eval_prompts": 1, "solution": "hint"}
    told = {"model": str(TINY / "teacher"), "context": "{question} {solution}"}
    with pytest.raises(UserError) as error:
        load(tmp_path, task=task, teacher=told)
    assert "as the teacher is told it (teacher.context, teacher.template)" in str(error.value)
    assert "of teacher.model" in str(error.value)
    assert "student.model" not in str(error.value)
    longer = changed(tmp_path, "teacher", config=lambda c: c.update(max_position_embeddings=4096))
    inputs = load(tmp_path, task=task, teacher={"model": str(longer), "context": "{question} {solution}"})
    assert inputs.stream.kept["train"] == [0, 1]
    assert inputs.stream.longest("train", judged=False) == 3
    assert inputs.stream.longest("train", judged=True) == 1504


# ---- ends --------------------------------------------------------------------------------------------------


def test_the_same_wrong_end_in_both_models_is_said(tmp_path: Path) -> None:
    """Every response would be cut off, although both models agree."""
    pair = [
        changed(tmp_path, n, generation_config=lambda c: c.update(eos_token_id=7))
        for n in ("student", "teacher")
    ]
    rows = questions(tmp_path, "a", "b")
    task = {"name": "math", "train": rows, "eval": rows, "eval_prompts": 1}
    models = {"student": {"model": str(pair[0])}, "teacher": {"model": str(pair[1])}}
    (warning,) = [f for f in found(load(tmp_path, task=task, **models), tmp_path) if f.startswith("warning")]
    assert (
        "the student's chat template ends the assistant's turn with '<eos>' (1), but the student ends a "
        "response with [7]"
    ) in warning
    assert found(load(tmp_path, task=task), tmp_path) == []
    assert found(load(tmp_path, **models), tmp_path) == [], "plain text has no template to go by"


def test_a_model_that_is_told_more_teaches_itself(tmp_path: Path) -> None:
    same = {"model": str(TINY / "student")}
    assert any("every loss is 0" in f for f in found(load(tmp_path, teacher=same), tmp_path))
    assert found(load(tmp_path, teacher={**same, "context": "{solution} {question}"}), tmp_path) == []


# ---- tokenizers --------------------------------------------------------------------------------------------


def renamed(old: str, new: str) -> Any:
    """Change a tokenizer.json: the token gets another name at the same id."""

    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        if old in vocabulary:
            vocabulary[new] = vocabulary.pop(old)
        for token in content["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]

    return change


def in_config(old: str, new: str) -> Any:
    """Change a tokenizer_config.json."""

    def change(content: dict[str, Any]) -> None:
        text = json.dumps(content).replace(json.dumps(old), json.dumps(new))
        content.clear()
        content.update(json.loads(text))

    return change


def test_a_renamed_special_token_is_no_other_tokenizer(tmp_path: Path) -> None:
    change = {"tokenizer": renamed("<user>", "<human>"), "tokenizer_config": in_config("<user>", "<human>")}
    teacher = changed(tmp_path, "teacher", **change)
    inputs = load(tmp_path, teacher={"model": str(teacher)})
    (warning,) = found(inputs, tmp_path)
    assert warning.startswith("warning: student and teacher differ in 1 special tokens")
    assert "2 '<user>' as 2 '<human>'" in warning
    assert inputs.tables == (None,)


def test_special_tokens_at_other_ids_are_exchanged(tmp_path: Path) -> None:
    inputs = load(
        tmp_path,
        teacher={"model": str(changed(tmp_path, "teacher", tokenizer=exchanged("<user>", "<assistant>")))},
    )
    (warning,) = found(inputs, tmp_path)
    assert "2 '<user>' as 3 '<user>', 3 '<assistant>' as 2 '<assistant>'" in warning
    (table,) = inputs.tables
    assert table is not None
    assert table[:5].tolist() == [0, 1, 3, 2, 4]
    assert (np.delete(table, [2, 3]) == np.delete(np.arange(len(table)), [2, 3])).all()


@pytest.mark.parametrize(("first", "second"), [("2", "4"), ("<user>", "4")])
def test_ordinary_tokens_that_differ_are_refused(tmp_path: Path, first: str, second: str) -> None:
    teacher = changed(tmp_path, "teacher", tokenizer=exchanged(first, second))
    (error,) = found(load(tmp_path, teacher={"model": str(teacher)}), tmp_path)
    assert re.match(
        r"error: student and teacher have different tokenizers: \d+ of 260 shared ids differ", error
    )


# ---- templates ---------------------------------------------------------------------------------------------


def test_a_teachers_own_template_frames_what_it_judges(tmp_path: Path) -> None:
    """The student's prompt is unchanged. The teacher's is in its own frame, with plain text as a user message
    and ids in the student's numbering.
    """
    teacher = changed(tmp_path, "teacher", tokenizer=exchanged("<user>", "<assistant>"))
    template = "{% for m in messages %}<assistant>{{ m['content'] }}<user>{% endfor %}"
    (teacher / "chat_template.jinja").write_text(
        template + "{% if thinking is defined %}{{ thinking }}{% endif %}"
    )
    rows = questions(tmp_path, "ab", "cd")
    task = {
        "name": "math",
        "train": rows,
        "eval": rows,
        "eval_prompts": 1,
        "chat_template_kwargs": {"thinking": "T"},
    }
    own = {"model": str(teacher), "template": "teacher", "context": "{question}!"}
    for chat in (True, False):
        stream = load(tmp_path, task={**task, "chat": chat}, teacher=own).stream
        said = hf.load_tokenizer(str(TINY / "student"), "m")
        assert said.decode(stream.encoded("train", 0)) == ("<user>cd<assistant>" if chat else "cd")
        assert said.decode(stream.as_told("train", 0)) == "<assistant>cd!<user>T"


def test_what_no_template_reads_is_refused(tmp_path: Path) -> None:
    rows = questions(tmp_path, "a", "b")
    task = {
        "name": "math",
        "train": rows,
        "eval": rows,
        "eval_prompts": 1,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with pytest.raises(UserError, match="reads no variable 'enable_thinking'"):
        load(tmp_path, task=task)
    plain = {"name": "tool", "sandbox": "none", "chat_template_kwargs": {"messages_": 1}}
    with pytest.raises(UserError, match="reads no variable 'messages_'"):
        load(tmp_path, task=plain)
    with pytest.raises(UserError, match="all prompts are plain text"):
        load(tmp_path, task={**plain, "chat_template_kwargs": {"m": 1}})
    with pytest.raises(UserError, match=r"no chat template is rendered with task.chat: false"):
        load(tmp_path, task={**task, "chat": False})
    with pytest.raises(UserError, match=r"task.system: plain text .* put the text into task.template"):
        load(tmp_path, task={**task, "chat": False, "chat_template_kwargs": {}, "system": "s"})


def test_a_teacher_with_its_own_frame_judges_one_turn_only(tmp_path: Path) -> None:
    task = {"name": "tool", "sandbox": "none", "train_prompts": 20, "eval_prompts": 4}
    with pytest.raises(
        UserError, match=r"teacher.template: .* tasks of one turn only; set teacher.template: student"
    ):
        load(tmp_path, task=task, teacher={"model": str(TINY / "teacher"), "template": "teacher"})


def test_a_template_that_does_not_show_what_a_tool_answers(tmp_path: Path) -> None:
    """Detected before anything runs, not at the first call."""
    student = changed(tmp_path, "student")
    (student / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif "
        "%}{% if m['role'] == 'assistant' %}<assistant>{{ m['content'] }}<eos>{% else %}<user>{{ "
        "m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = questions(tmp_path, "a", "b")
    task = {"name": "tool", "train": rows, "eval": rows, "eval_prompts": 1, "sandbox": "none"}
    models = {
        "student": {"model": str(student)},
        "teacher": {"model": str(TINY / "teacher"), "template": "student"},
    }
    assert not [f for f in found(load(tmp_path, task=task, **models), tmp_path) if f.startswith("error")]
    (error,) = [
        f
        for f in found(load(tmp_path, task={**task, "notation": "native"}, **models), tmp_path)
        if f.startswith("error")
    ]
    assert (
        "refuses a message of role 'tool' after the assistant's (no tools here); set task.notation: code"
        in error
    )


def test_one_prompt_is_shown_as_both_read_it(tmp_path: Path) -> None:
    rows = questions(tmp_path, "held", "1+1\n<user>")
    task = {"name": "math", "train": rows, "eval": rows, "eval_prompts": 1}
    shown = "\n".join(doctor.shown(load(tmp_path, task=task)))
    assert f"what the student reads (row 2 of {rows!r}), " in shown
    assert "    ⟦<user>⟧1+1\n    " in shown
    assert shown.endswith("⟦<assistant>⟧\nthe teacher reads the same")
    told = {"model": str(TINY / "teacher"), "context": "{question} ({answer})"}
    shown = "\n".join(doctor.shown(load(tmp_path, task=task, teacher=told)))
    assert "what the teacher reads, " in shown
    assert shown.endswith(" (1)⟦<assistant>⟧")
