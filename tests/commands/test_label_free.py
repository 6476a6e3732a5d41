"""Distillation without answers: the KL to the teacher is the metric everywhere, and nothing says nan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SLOW, TINY, Fopd, lines, metrics, small_recipe, summary
from pair_kit import changed, conversations, exchanged

from fopd_cli.engines.models import hf
from fopd_cli.engines.text.vocabularies import inverse
from fopd_cli.errors import UserError
from fopd_cli.evaluation import evaluate
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.journal import records
from fopd_cli.samples import Rollout, SampleId, SampleStats


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    made = small_recipe(TINY, **{"learner": {"steps": 2}, **changes})
    rows = conversations(folder)
    made["task"] = {"name": "chat", "train": rows, "eval": rows, "eval_prompts": 6}
    return made


def stats(kl: list[float], keys: list[int]) -> SampleStats:
    n = len(keys)
    values = {name: np.ones(n) for name in SampleStats.__annotations__}
    return SampleStats(
        **{**values, "keys": np.array(keys), "kl": np.array(kl), "kl_quartiles": np.ones((n, 4))}
    )


def rollout(key: int, finish: Any = "stop") -> Rollout:
    return Rollout(key, np.arange(4), 2, np.ones(2, bool), np.zeros(2), [(0, 0, 2)], finish)


@pytest.mark.parametrize("prompts", [1, 2])
def test_a_record_without_grades_has_the_kl_and_its_error(prompts: int) -> None:
    kl = [1.0, 3.0, 5.0, 7.0][: 2 * prompts]
    ids = [SampleId("eval", 0, i // 2, i % 2) for i in range(len(kl))]
    samples = [(sample, math.nan, rollout(i)) for i, sample in enumerate(ids)]
    record = records.evaluation(
        3, [stats(kl[:1], [0]), stats(kl[1:], list(range(1, len(kl))))], samples, [{}] * len(kl)
    )
    line = records.evaluation_line(record)
    assert "nan" not in line
    assert "score" not in line
    if prompts == 2:  # means 2 and 6 of the two prompts: a deviation of sqrt(8), over sqrt(2)
        assert record["kl_error"] == pytest.approx(2.0)
        assert line == "held-out at step 3: KL to the teacher 4.0000 ± 2.0000 (2 prompts)"
    else:
        assert line == "held-out at step 3: KL to the teacher 2.0000 (1 prompts)"
    timing = {"seconds": 1.0, "busy": {}}
    step = {"score": math.nan, "loss": 1.0, "kl": 1.0, "lag_mean": 0.0, "freshness": 1.0, "tokens": 1}
    assert "score" not in records.bar(step, timing)
    assert records.bar({**step, "score": 0.5}, timing)["score"] == "0.50"


def test_responses_that_are_cut_off_are_said() -> None:
    samples = [(SampleId("eval", 0, i, 0), 1.0, rollout(i, "length" if i else "stop")) for i in range(4)]
    line = records.evaluation_line(records.evaluation(0, [stats([1.0] * 4, [0, 1, 2, 3])], samples, [{}] * 4))
    assert line.endswith("; 75% of the responses were cut off at max_new_tokens")


@SLOW
def test_a_label_free_run_and_its_evaluation_agree(fopd: Fopd) -> None:
    made = recipe(fopd.folder)
    done = fopd("run", fopd.recipe(made), "--run-dir", fopd.folder / "run")
    run = fopd.folder / "run"
    assert "nan" not in done.out + done.err
    assert "held-out at step 2: KL to the teacher " in done.err
    assert "KL to the teacher " in done.out.splitlines()[-1]
    assert "24 of 24 rows end with the assistant's answer" in done.err
    found = summary(run)
    assert found["score_last"] is None
    assert found["kl_last"] < found["kl_first"]
    assert found["kl_last_error"] > 0
    out = json.loads(fopd("eval", run).out)
    assert out["score"] is None
    assert out["kl"] == pytest.approx(found["kl_last"], rel=1e-4)
    assert out["kl_error"] == pytest.approx(found["kl_last_error"], rel=1e-4)
    rows = fopd.folder / "rows.jsonl"
    fopd("eval", run, "--out", rows, "--generate-only")
    assert all(row["kl"] is None for row in lines(rows)[1:])
    again = json.loads(fopd("eval", run, "--out", rows, "--grade-only").out)
    assert again["kl"] == pytest.approx(out["kl"], rel=1e-6)
    assert all(row["kl"] > 0 for row in lines(rows)[1:])


@SLOW
@pytest.mark.parametrize("support", ["topk", "sampled", "mc"])
def test_any_support_and_a_task_whose_answer_is_null(tmp_path: Path, support: str) -> None:
    made = recipe(tmp_path, loss={"support": support}, teacher={"k": 32, "context": "{question} {solution}"})
    made["task"] |= {"name": "math", "question": "messages", "answer": None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    found = evaluate(str(TINY / "student"), load_recipe(tmp_path / "r.yaml"), None)
    assert found["score"] is None
    assert found["rows"] == 6
    assert math.isfinite(found["kl"])


@SLOW
def test_a_model_of_another_tokenizer_gets_no_kl(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, teacher={"model": str(changed(tmp_path, "teacher", tokenizer=exchanged("2", "4")))}
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(UserError, match="different tokenizers"):
        evaluate(str(TINY / "student"), load_recipe(tmp_path / "r.yaml"), None)


@SLOW
@pytest.mark.parametrize("support", ["full", "topk"])
def test_a_teacher_with_exchanged_ids_teaches_the_same(fopd: Fopd, support: str) -> None:
    """The copy's tokenizer and embeddings are permuted alike, so it is the same teacher with other ids."""
    table = np.arange(260, dtype=np.int32)
    table[[2, 3]] = [3, 2]
    other = changed(fopd.folder, "teacher", tokenizer=exchanged("<user>", "<assistant>"))
    model: Any = hf.load_model(str(other), "m", torch.float32)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:260] = weight[torch.from_numpy(inverse(table)).long()]
    assert model.get_output_embeddings().weight is weight
    model.save_pretrained(other)
    plain = recipe(fopd.folder, loss={"support": support})
    moved = {**plain, "teacher": {**plain["teacher"], "model": str(other)}}
    first, second = fopd.run(plain, "plain"), fopd.run(moved, "moved")
    # The tail class's mass is 1 minus the others', so it shows the last bits of log-probs.
    tolerance = {"full": 1e-4, "topk": 1e-2}[support]
    for a, b in zip(metrics(first), metrics(second), strict=True):
        assert b["kl"] == pytest.approx(a["kl"], rel=tolerance)


@SLOW
def test_a_teacher_in_its_own_frame_judges_the_same_response(fopd: Fopd) -> None:
    """If its own template equals the student's, nothing changes; with another one, labels change but
    responses do not.
    """
    plain = recipe(fopd.folder)
    other = changed(fopd.folder, "teacher")
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}<user>{{ m['content'] }}!{% endfor %}<assistant>"
    )
    runs = [
        fopd.run({**plain, "teacher": {**plain["teacher"], "model": model, "template": template}}, name)
        for name, model, template in (
            ("plain", str(TINY / "teacher"), "student"),
            ("own", str(TINY / "teacher"), "teacher"),
            ("other", str(other), "teacher"),
        )
    ]
    first, own, strange = (metrics(run)[0] for run in runs)
    assert own["kl"] == pytest.approx(first["kl"], rel=1e-5)
    assert strange["kl"] != pytest.approx(first["kl"], rel=1e-3)
    assert [s["response"] for s in lines(runs[2] / "samples.jsonl")][:2] == [
        s["response"] for s in lines(runs[0] / "samples.jsonl")
    ][:2]
