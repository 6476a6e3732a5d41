"""The shipped recipe on a real pretrained pair: SmolLM2-135M-Instruct and a student of 20 of its layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SLOW, Fopd, check_accounts, lines, metrics, reach, summary
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = SLOW
LONG_S = 1500.0
# The teacher's two hundred words hold some twenty of these; the untrained student's text one, the trained
# one's ten or more.
COMMON = set(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "can",
        "for",
        "from",
        "has",
        "have",
        "in",
        "is",
        "it",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "we",
        "with",
        "you",
    ]
)


QUESTIONS = (
    "Tell me about the sea.",
    "Why do people read books?",
    "What is a good way to learn a language?",
    "A baker sells 12 loaves in the morning and 7 in the afternoon. How many is that?",
    "Tom has 3 boxes with 8 pencils each. How many pencils does he have?",
    "A train goes 60 miles an hour. How far does it go in 3 hours?",
)


def shipped(pair: Path, **changes: Any) -> dict[str, Any]:
    """recipes/real-cpu.yaml with this test's pair, and changes to its sections."""
    recipe = yaml.safe_load((ROOT / "recipes" / "real-cpu.yaml").read_text())
    recipe["student"]["model"], recipe["teacher"]["model"] = str(pair / "student"), str(pair / "teacher")
    recipe["task"] |= {name: str(ROOT / "recipes" / "questions.jsonl") for name in ("train", "eval")}
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    return recipe


def english(text: str) -> int:
    """How many different common words a text contains."""
    return len(COMMON & set(re.findall(r"[a-z']+", text.lower())))


def answers(model: Path) -> str:
    """Greedy answers from plain transformers, to questions that were never trained on."""
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    said = []
    for question in QUESTIONS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        with torch.no_grad():
            out = lm.generate(ids, max_new_tokens=48, do_sample=False)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return " ".join(said)


def test_half_of_the_recipe_teaches_it_to_speak_again(fopd: Fopd, real_pair: Path) -> None:
    """Fifteen of its thirty steps, killed midway and resumed: the KL falls by a third, every prompt is
    accounted for, and the export answers in English.

    The KL is not enough: the teacher soon agrees with a student that says "A" forever (docs/real-pair.md).
    Then only the beginning of an answer stays far from the teacher.
    """
    run = fopd.folder / "run"
    recipe = shipped(real_pair, learner={"steps": 15}, checkpoint={"every": 5})
    process = fopd.start("run", fopd.recipe(recipe), "--run-dir", run)
    reach(process, run, 7, LONG_S)
    process.kill()
    process.communicate()
    fopd("resume", run, timeout=LONG_S)
    assert check_accounts(run)["trained"] == 15 * 16
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 16))
    first, last = steps[0]["kl"], sum(r["kl"] for r in steps[-5:]) / 5
    assert last < 0.7 * first, (first, last)
    quarters = [r for r in metrics(run) if r["kind"] == "eval"][-1]["kl_by_quartile"]
    assert quarters[0] < 4 * quarters[-1], quarters  # 2.2; six times in a student that fell silent
    assert summary(run)["kl_last"] < 1.2
    report = json.loads(fopd("eval", run, "--samples", "1", timeout=LONG_S).out)
    assert report["prompts"] == 32
    fopd("export", run, fopd.folder / "out")
    before, after = answers(real_pair / "student"), answers(fopd.folder / "out")
    assert english(after) >= 6 > 2 * english(before), (before, after)


@pytest.mark.parametrize(("engine", "dtype", "depth"), [("transformers", "fp32", 0), ("vllm", "bf16", 2)])
def test_every_engine_and_dtype_runs_it(
    fopd: Fopd, real_pair: Path, engine: str, dtype: str, depth: int
) -> None:
    """A few steps: packing on, a noise floor that is small next to the drift from training, and a falling
    KL.
    """
    if engine == "vllm":
        pytest.importorskip("vllm")
    recipe = shipped(
        real_pair,
        sampler={"engine": engine, "dtype": dtype},
        teacher={"dtype": dtype},
        learner={"dtype": dtype, "steps": 3},
        schedule={"max_lag": depth},
        freshness={"policy": "fopd" if depth else "sync"},
        task={"eval_prompts": 4},
    )
    fopd("run", fopd.recipe(recipe), "--run-dir", fopd.folder / "run", timeout=LONG_S)
    steps = [r for r in lines(fopd.folder / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert steps[-1]["kl"] < steps[0]["kl"]
    fresh = steps[0]  # sampled by the weights that learn: only the engines' numerics differ
    assert fresh["lag_max"] == 0
    assert fresh["drift_roll"] < (0.1 if dtype == "bf16" else 1e-4)
