"""Model families that differ from Llama in heads, windows, states and experts, from first command to last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLOW, Fopd, make_pair, metrics, small_recipe, summary
from pair_kit import conversations
from transformers import AutoModelForCausalLM

# Whether samples can lie in one row.
FAMILIES = {"gemma3_text": True, "qwen3_5_text": False, "qwen3_moe": True}


@torch.no_grad()
def kl(student: Path, teacher: Path) -> float:
    """Mean KL(student || teacher) over random ids, with plain transformers, one sequence at a time."""
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (student, teacher)
    ]
    rng, found = np.random.Generator(np.random.PCG64(0)), []
    for _ in range(4):
        ids = torch.from_numpy(rng.integers(4, 200, size=(1, 40)))
        pi, p = (torch.log_softmax(m(input_ids=ids, use_cache=False).logits[0].double(), -1) for m in models)
        found.append((pi.exp() * (pi - p)).sum(-1))
    return float(torch.cat(found).mean())


@SLOW
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_doctor_to_export(family: str, fopd: Fopd) -> None:
    pair, packing = make_pair(fopd.folder / "pair", family, "--dtype", "float32"), FAMILIES[family]
    rows = conversations(fopd.folder)
    content = small_recipe(pair, teacher={"packing": packing}, learner={"lr": 3e-3, "packing": packing})
    content["task"] = {"name": "chat", "train": rows, "eval": rows, "eval_prompts": 6}
    assert "error" not in fopd("doctor", fopd.recipe(content)).out
    run = fopd.run(content)
    first, found = metrics(run), summary(run)
    steps = [record for record in first if record["kind"] == "step"]
    assert all(record["drift_roll"] < 1e-5 for record in steps)  # sampler and learner are the same model
    assert found["kl_last"] < found["kl_first"]
    fopd("resume", run, "--step", "2")
    assert metrics(run) == first  # the second half again, to the bit
    assert json.loads(fopd("eval", run).out)["kl"] == pytest.approx(found["kl_last"], rel=1e-4)
    fopd("export", run, fopd.folder / "out")
    assert kl(fopd.folder / "out", pair / "teacher") < kl(pair / "student", pair / "teacher")
    assert kl(run / "student", fopd.folder / "out") == pytest.approx(0, abs=1e-9)
