"""`engine: auto`: which engine it chooses, and what it reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe

from fopd_cli.engines.auto import resolved
from fopd_cli.engines.vllm import build as vllm_build
from fopd_cli.inputs import with_engines
from fopd_cli.recipe import Recipe, dump_recipe

INSTALLED, ABSENT = None, "vLLM is not installed: pip install it"
MC = {"support": "mc"}
TOPK = {"support": "topk"}
ADAPTER = {"rank": 4, "publish": "adapter"}


def recipe(pair: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(small_recipe(pair, **changes))


def names(found: Recipe) -> tuple[str, ...]:
    return (found.sampler.engine, *(t.engine for t in found.teachers))


@pytest.mark.parametrize(
    ("cuda", "vllm", "changes", "expected", "why"),
    [
        (False, INSTALLED, {}, "transformers transformers", "sampler.engine: auto -> transformers (no CUDA"),
        (
            True,
            INSTALLED,
            {},
            "vllm transformers",
            "teacher.engine: auto -> transformers (teacher.targets: hid",
        ),
        (
            True,
            INSTALLED,
            {"loss": TOPK},
            "vllm vllm",
            "sampler.engine: auto -> vllm; teacher.engine: auto -> vllm",
        ),
        (
            True,
            ABSENT,
            {"loss": TOPK},
            "transformers transformers",
            "(vLLM is not installed: pip install it)",
        ),
        (
            True,
            INSTALLED,
            {"loss": MC},
            "transformers transformers",
            "sampler.engine: auto -> transformers (loss.s",
        ),
        (True, INSTALLED, {"loss": {**TOPK, "student_k": 4}}, "vllm transformers", "(loss.student_k: 4)"),
        (False, ABSENT, {"lora": ADAPTER}, "vllm transformers", "sampler.engine: auto -> vllm"),
    ],
)
def test_auto_is_the_fastest_that_does_what_the_recipe_asks(
    pair: Path,
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    vllm: str | None,
    changes: dict[str, Any],
    expected: str,
    why: str,
) -> None:
    monkeypatch.setattr(vllm_build, "missing", lambda: vllm)
    if lora := changes.pop("lora", None):
        changes = {"student": {"lora": lora}}
    found, said = resolved(recipe(pair, **changes), cuda)
    assert " ".join(names(found)) == expected
    assert why in str(said)


def test_an_architecture_that_vllm_refuses_stays_with_transformers(
    llama_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_build, "missing", lambda: None)
    shutil.copytree(llama_pair / "student", student := tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (student / "config.json").write_text(json.dumps(config))
    found, said = resolved(recipe(llama_pair, student={"model": str(student)}), cuda=True)
    assert found.sampler.engine == "transformers"
    assert "(sampler.engine: llama scales its rotary embedding" in str(said)


def test_what_was_named_stays_and_is_not_talked_about(pair: Path) -> None:
    named = recipe(pair, sampler={"engine": "vllm"}, teacher={"engine": "transformers"})
    assert resolved(named, cuda=False) == (named, None)


def test_several_teachers_are_resolved_each_under_its_name(pair: Path) -> None:
    model = str(pair / "teacher")
    both = [{"name": "maths", "model": model}, {"name": "code", "model": model, "engine": "transformers"}]
    found, said = resolved(recipe(pair, teacher=both), cuda=False)
    assert names(found) == ("transformers",) * 3
    assert "teacher.maths.engine: auto -> transformers" in str(said)
    assert "teacher.code" not in str(said)


def test_the_choice_stands_in_the_runs_recipe(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The record holds the choice, so a resume on any machine continues with the same engines."""
    first = with_engines(recipe(pair))
    assert "engine: auto -> " in capsys.readouterr().err
    assert "engine: auto" not in dump_recipe(first)
    assert with_engines(first) == first
    assert not capsys.readouterr().err
