"""The command line: every mistake gives one clear line and exit code 2, before anything starts or is lost."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SLOW, TINY, Fopd, make_pair, small_recipe


def refuse(fopd: Fopd, content: dict[str, Any], *args: str) -> str:
    """`fopd run` must refuse this recipe; returns the one line it prints."""
    err = fopd("run", fopd.recipe(content), "--run-dir", fopd.folder / "run", *args, code=2).err
    found = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, err
    assert not (fopd.folder / "run").exists()
    return found[0]


@SLOW
def test_a_model_directory_that_is_none(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refuse(
        fopd, small_recipe(pair, student={"model": str(tmp_path / "empty")})
    )
    assert "there is no directory" in refuse(fopd, small_recipe(pair, teacher={"model": "./nowhere"}))
    broken = tmp_path / "broken"
    shutil.copytree(pair / "student", broken)
    (broken / "config.json").write_text("{nonsense")
    assert "student.model: cannot load" in refuse(fopd, small_recipe(pair, student={"model": str(broken)}))


def test_weights_that_cannot_be_read(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    """They are detected before a worker starts, and reported in one line."""
    broken = tmp_path / "broken"
    shutil.copytree(pair / "student", broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    recipe = fopd.recipe(small_recipe(pair, student={"model": str(broken)}))
    err = fopd("run", recipe, "--run-dir", fopd.folder / "run", code=2).err
    assert "student.model: cannot read the weights of" in err


def test_different_tokenizers(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair / "teacher", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[10:12]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "different tokenizers: 2 of 260 shared ids differ" in refuse(
        fopd, small_recipe(pair, teacher={"model": str(other)})
    )


def test_different_ends(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair / "teacher", other)
    for eos, expected in (
        (7, "the student ends a response with token [1], the teacher with [7]"),
        ([1, 7], None),
    ):
        config = json.loads((other / "generation_config.json").read_text())
        (other / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
        recipe = small_recipe(pair, teacher={"model": str(other)})
        if expected:
            assert expected in refuse(fopd, recipe)
        else:
            out = fopd("doctor", fopd.recipe(recipe), "--no-sanity", code=2).out
            assert "warning: the student ends" in out


def test_no_chat_template(fopd: Fopd, tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "plain", "llama")
    for name in ("student", "teacher"):
        (pair / name / "chat_template.jinja").unlink()
    (tmp_path / "q.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n'
    )
    recipe = small_recipe(pair)
    recipe["task"] = {"name": "math", "train": "q.jsonl", "eval": "q.jsonl", "eval_prompts": 1}
    assert "no chat template; set task.chat: false" in refuse(fopd, recipe)


@SLOW
def test_datasets_that_are_missing_empty_or_lack_a_column(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    recipe = small_recipe(pair)
    recipe["task"] = {"name": "math", "train": str(path), "eval": str(path)}
    assert "there is no file" in refuse(fopd, recipe)
    path.write_text("")
    assert "has no rows" in refuse(fopd, recipe)
    path.write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert "set task.question" in refuse(fopd, recipe)


def test_a_prompt_longer_than_the_context(fopd: Fopd, pair: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"question": "x" * n, "answer": "1"}) + "\n" for n in (5, 1020))
    )
    recipe = small_recipe(pair)
    recipe["task"] = {"name": "math", "train": "q.jsonl", "eval": "q.jsonl", "eval_prompts": 1}
    message = refuse(fopd, recipe)
    assert re.search(r"task.train: row 2 of '.*q.jsonl' has 1022 tokens, with 10 new ones", message)
    assert "context of 1024 of student.model, and so with all 1 train prompts" in message


def test_a_run_directory_that_exists(fopd: Fopd, pair: Path) -> None:
    run = fopd.folder / "run"
    run.mkdir()
    (run / "precious").write_text("x")
    err = fopd("run", fopd.recipe(small_recipe(pair)), "--run-dir", run, code=2).err
    assert "exists and is not empty" in err
    assert (run / "precious").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "no such recipe"),
        (["run"], "fopd new writes one"),
        (["run", "x.yaml", "--nonsense"], "No such option"),
        (["resume", "nowhere"], "is not a run directory"),
        (["export", "nowhere", "out"], "is not a run directory"),
        (["eval", "nowhere"], "--task"),
        (["recipe"], "--explain"),
        (["nonsense"], "No such command"),
    ],
)
def test_usage_mistakes(fopd: Fopd, arguments: list[str], message: str) -> None:
    assert message in fopd(*arguments, code=2).err


def test_dry_run_prints_the_resolved_recipe_and_starts_nothing(fopd: Fopd) -> None:
    for name in ("quickstart", "qwen-7b-from-32b", "paper-tools"):
        out = fopd("run", ROOT / "recipes" / f"{name}.yaml", "--dry-run", "--set", "seed=7").out
        assert yaml.safe_load(out)["seed"] == 7
        assert "# here" in out
    assert [p.name for p in fopd.folder.iterdir()] == []


def test_doctor_finds_nothing_wrong_with_a_sound_recipe(fopd: Fopd) -> None:
    done = fopd("doctor", fopd.recipe(small_recipe(TINY)))
    assert "no findings" in done.out


def test_doctor_says_that_the_teacher_is_the_student(fopd: Fopd, pair: Path) -> None:
    out = fopd(
        "doctor", fopd.recipe(small_recipe(pair, teacher={"model": str(pair / "student")})), code=2
    ).out
    assert "the same model: every loss is 0" in out


def test_explain_lists_every_key(fopd: Fopd) -> None:
    out = fopd("recipe", "--explain").out
    for key in ("freshness.xi", "schedule.max_lag", "placement.threads.sampler", "task[math].question"):
        assert key in out


@pytest.mark.parametrize(
    "command",
    ["run", "resume", "fork", "runs", "diff", "report", "chat", "eval", "doctor", "recipe", "export"],
)
def test_every_command_has_help(fopd: Fopd, command: str) -> None:
    assert len(fopd(command, "--help").out) > 300
