"""Real runs of `fopd run`: processes, queues, shared memory, tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SLOW, TINY, Fopd, check_accounts, lines, make_pair, metrics, small_recipe, summary
from inprocess_kit import conducted

from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.placement import TURNS, from_plain


def test_two_synchronous_runs_are_bitwise_the_same(fopd: Fopd, pair: Path) -> None:
    recipe = small_recipe(pair, eval={"every": 2})
    first, second = (fopd.run(recipe, name) for name in ("a", "b"))
    assert metrics(first) == metrics(second)
    assert lines(first / "ledger.jsonl") == lines(second / "ledger.jsonl")
    assert {r["step"] for r in metrics(first) if r["kind"] == "eval"} == {0, 2, 4}
    assert {r["lag_max"] for r in metrics(first) if r["kind"] == "step"} == {0}


def test_an_asynchronous_run_and_all_that_it_leaves(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(
        small_recipe(pair, schedule={"max_lag": 2}, learner={"steps": 8}, teacher={"delay_ms": 10})
    )
    prompts = check_accounts(run)
    assert prompts["drawn"] == 64
    assert prompts["in_flight"] == 0
    s = summary(run)
    assert s["steps"] == 8
    assert 1 <= s["max_lag"] <= 2
    assert 0 < s["mean_freshness"] < 1
    assert s["kl_last"] < s["kl_first"]
    assert s["generated_tokens"] >= s["trained_tokens"] > 0
    assert s["wall_seconds"] > 0
    steps = [r for r in lines(run / "metrics.jsonl") if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all(r["coverage_roll"] == 1 and r["drift_sup"] == 0 for r in steps)
    assert {"sampler", "teacher", "learner"} <= set(steps[-1]["timing"]["busy"])
    assert set(steps[-1]["timing"]["memory_bytes"]) == {"sampler-0", "teacher-0", "learner-0", "grader-0"}
    assert all(10**7 < size < 10**10 for size in steps[-1]["timing"]["memory_bytes"].values())
    assert lines(run / "samples.jsonl")[0].keys() >= {"prompt", "response", "score", "versions"}
    assert any((run / "tensorboard").glob("events.*"))
    assert {p.stem for p in (run / "logs").glob("*.log")} == {
        "sampler-0",
        "teacher-0",
        "learner-0",
        "grader-0",
    }
    assert not list(run.glob(".rendezvous*"))


def test_sampling_runs_less_far_ahead_while_the_student_moves(fopd: Fopd, pair: Path) -> None:
    recipe = small_recipe(pair, schedule={"max_lag": 3}, learner={"steps": 8}, freshness={"max_drift": 1e-9})
    steps = [r for r in lines(fopd.run(recipe) / "metrics.jsonl") if r["kind"] == "step"]
    assert {r["timing"]["ahead"] for r in steps} == {0, 1}
    assert max(r["lag_max"] for r in steps) == 1


def spans(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(start, end) of each kind of work in the timeline, in microseconds."""
    events = json.loads((run / "trace.json").read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"sampler-0", "teacher-0", "learner-0"} <= set(tracks.values())
    out: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            out.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return out


def overlap(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in some for c, d in others)


@SLOW
def test_with_depth_the_teacher_and_the_learner_work_at_the_same_time(fopd: Fopd, pair: Path) -> None:
    """A slow teacher: at max_lag 0 nothing works beside the learner; at max_lag 2 teacher and sampler do."""
    found = {}
    for depth in (0, 2):
        recipe = small_recipe(
            pair, schedule={"max_lag": depth}, learner={"steps": 8}, teacher={"delay_ms": 20}
        )
        found[depth] = spans(fopd.run(recipe, f"depth{depth}"))
    # Spans carry the clock of their worker; 1 ms forgives its rounding.
    assert overlap(found[0]["train"], found[0]["score"]) < 1e3
    assert overlap(found[2]["train"], found[2]["score"]) > 1e4
    assert overlap(found[2]["generate"], found[2]["score"]) > 1e4


def test_fixed_lag(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair, schedule={"lag": 3}, learner={"steps": 7}))
    lags = [(r["lag_mean"], r["lag_max"]) for r in metrics(run) if r["kind"] == "step"]
    assert lags == [(0, 0), (1, 1), (2, 2), (3, 3), (3, 3), (3, 3), (3, 3)]
    check_accounts(run)


@SLOW
@pytest.mark.parametrize("inflight", ["keep", pytest.param("keep_stale_kv", marks=pytest.mark.slow)])
def test_updates_in_flight_give_rollouts_of_several_versions(fopd: Fopd, pair: Path, inflight: str) -> None:
    recipe = small_recipe(
        pair,
        schedule={"max_lag": 3, "inflight": inflight},
        sampler={"max_new_tokens": 200, "concurrency": 4},
        learner={"steps": 8, "batch_samples": 4},
    )
    run = fopd.run(recipe)
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert max(r["versions_per_rollout"] for r in steps) > 1
    assert any(r.get("stale_kv", 0) > 0 for r in steps) == (inflight == "keep_stale_kv")
    assert summary(run)["max_lag"] <= 3
    check_accounts(run)


@SLOW
def test_several_replicas_and_ranks(fopd: Fopd, pair: Path) -> None:
    recipe = small_recipe(pair, placement={"sampler": 2, "teacher": 2, "learner": 2}, schedule={"max_lag": 1})
    run = fopd.run(recipe)
    check_accounts(run)
    alone = fopd.run(small_recipe(pair), "alone")
    ours, theirs = (next(r for r in metrics(x) if r["kind"] == "eval") for x in (run, alone))
    assert ours["score"] == theirs["score"]
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-4)


def test_processes_meet_in_a_run_directory_that_is_relative_as_its_default_is(fopd: Fopd, pair: Path) -> None:
    """A learner that computes in bf16 joins a process group, also alone."""
    recipe = fopd.recipe(small_recipe(pair, learner={"steps": 1, "dtype": "bf16"}, placement={"teacher": 2}))
    fopd("run", recipe, "--run-dir", "runs/first", timeout=120)
    fopd("resume", "runs/first", "--set", "learner.steps=2", timeout=120)
    assert [r["step"] for r in metrics(fopd.folder / "runs" / "first") if r["kind"] == "step"] == [1, 2]


def test_time_slicing_takes_turns(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair, placement={"mode": "timeslice"}, schedule={"max_lag": 1}))
    found = spans(run)
    for a, b in (("train", "score"), ("train", "generate"), ("score", "generate")):
        assert overlap(found[a], found[b]) < 1e3
    placed = from_plain(json.loads((run / "placement.json").read_text())["plan"])
    assert placed.overlaps == TURNS  # nothing moves on a CPU
    check_accounts(run)


POLICIES: dict[str, dict[str, Any]] = {
    "trust": {"trust": 0.01},
    "fixed_refresh": {"refresh": {"every": 2}},
    "lag_weight": {},
    "reweight": {"weights": "normalized", "drift": "topk", "drift_k": 8},
    "reweight+anchor": {"drift": "quadratic"},
    "fopd": {"refresh": {"mean": 1.0, "every_at_least": 3}, "step_scale": "freshness", "drift": "exact"},
}


def run_in(processes: bool, fopd: Fopd, recipe: dict[str, Any]) -> Path:
    """A run in real processes, whose accounts are checked, or in this one, which is ten times as fast."""
    if not processes:
        return conducted(load_recipe(fopd.recipe(recipe)), fopd.folder)
    run = fopd.run(recipe)
    check_accounts(run)
    return run


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(fopd: Fopd, pair: Path, policy: str) -> None:
    fresh = {"policy": policy, "xi": 0.01, **POLICIES[policy]}
    loss = {"support": "sampled"} if policy == "trust" else {}
    recipe = small_recipe(pair, schedule={"max_lag": 2}, freshness=fresh, loss=loss, learner={"steps": 7})
    run = run_in(policy in ("fopd", "reweight"), fopd, recipe)
    refreshes = [r["step"] for r in metrics(run) if r["kind"] == "refresh"]
    assert refreshes == {"fixed_refresh": [2, 4, 6], "fopd": [3, 6]}.get(policy, [])
    if policy in ("fopd", "reweight"):
        assert bool(summary(run)["prompts"]["refreshed"]) == bool(refreshes)
    steps = {r["step"]: r for r in metrics(run) if r["kind"] == "step"}
    for step in refreshes:
        assert steps[step + 1]["lag_max"] == 0, "the first batch after a refresh is fresh"
    if policy == "trust":
        assert any(s["clamped"] > 0 for s in steps.values() if s["lag_max"] > 0), "some token is spent"
    if policy == "lag_weight":
        assert steps[7]["weight"] == pytest.approx(1 / (1 + steps[7]["lag_mean"]) - 0.01, abs=0.05)


LOSSES: dict[str, dict[str, Any]] = {
    "forward": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd", "beta": 0.3, "average": "token"},
    "topk": {"kind": "reverse_kl", "support": "topk"},
    "union": {"support": "topk", "student_k": 16},
    "cached": {"support": "sampled", "advantage": "cached"},
    "mc": {"support": "mc", "draws": 4},
    "importance": {"support": "sampled", "advantage": "recomputed", "importance": True, "max_ratio": 2.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(fopd: Fopd, pair: Path, name: str) -> None:
    recipe = small_recipe(pair, loss=LOSSES[name], schedule={"max_lag": 1}, learner={"steps": 6})
    run = run_in(name in ("topk", "cached"), fopd, recipe)
    first, *_, last = (r["kl"] for r in metrics(run) if r["kind"] == "eval")
    assert np.isfinite([first, last]).all()
    if name in ("forward", "jsd", "topk", "union"):
        assert last < first


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=SLOW)])
def test_a_llama_pair_on_questions_from_a_file(
    fopd: Fopd, llama_pair: Path, tmp_path: Path, dtype: str
) -> None:
    """Two local model directories, a chat template, a jsonl of questions: the KL falls, and the student loads
    elsewhere.
    """
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": f"#### {2 * i + 1}"} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = small_recipe(
        llama_pair,
        task={"name": "math", "train": "q.jsonl", "eval": "q.jsonl", "eval_prompts": 8},
        sampler={"max_new_tokens": 16, "concurrency": 8, "dtype": dtype},
        learner={"steps": 12, "batch_samples": 8, "lr": 2e-3, "warmup_steps": 0, "dtype": dtype},
        schedule={"max_lag": 1},
    )
    recipe["teacher"]["dtype"] = dtype
    del recipe["task"]["horizon"]
    run = fopd.run(recipe)
    s = summary(run)
    assert s["kl_last"] < 0.9 * s["kl_first"]
    floor = metrics(run)[-2]["noise_floor"]
    assert floor < (1e-3 if dtype == "bf16" else 1e-9)
    fopd("export", run, tmp_path / "out", "--step", "12")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(model.dtype) == {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[dtype]
    before = AutoModelForCausalLM.from_pretrained(llama_pair / "student", dtype=model.dtype)
    assert any(not p.equal(q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert (
        "hello" in AutoTokenizer.from_pretrained(tmp_path / "out").decode(model.config.eos_token_id) + "hello"
    )


@SLOW
@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_several_teachers_judge_what_is_theirs(fopd: Fopd, pair: Path, tmp_path: Path, kind: str) -> None:
    """Held-out questions go to the student's own twin, so their KL is 0; training questions to the real
    teacher.
    """
    rows = [
        {"question": f"{i}+{i}=", "answer": str(2 * i), "who": "twin" if i < 8 else "wise"} for i in range(60)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = small_recipe(
        pair,
        task=None,
        learner={"steps": 2, "lr": 1e-9},
        schedule={"max_lag": 1},
        placement={"teacher": 2 if kind == "topk" else 1},
    )
    recipe["task"] = {
        "name": "math",
        "train": "q.jsonl",
        "eval": "q.jsonl",
        "eval_prompts": 8,
        "chat": False,
        "teacher": "who",
    }
    both = {"targets": kind, "k": 8, "batch_samples": 4}
    recipe["loss"] = {"support": "full" if kind == "hidden" else "topk"}
    recipe["teacher"] = [
        {"name": "wise", "model": str(pair / "teacher"), **both},
        {"name": "twin", "model": str(pair / "student"), **both},
    ]
    run = fopd.run(recipe)
    check_accounts(run)
    records = metrics(run)
    assert all(abs(r["kl"]) < 1e-6 for r in records if r["kind"] == "eval")
    assert all(r["kl"] > 0.01 for r in records if r["kind"] == "step")
    assert {p.name for p in (run / "logs").glob("teacher*")} >= {"teacher-wise-0.log", "teacher-twin-0.log"}
    fopd("resume", run, "--step", "2", "--set", "learner.steps=4", "--set", "teacher.twin.batch_samples=2")
    check_accounts(run)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({**row, "who": "nobody"}) + "\n" for row in rows))
    err = fopd("run", fopd.recipe(recipe), "--run-dir", tmp_path / "never", code=2).err
    assert "names the teacher 'nobody'; there are wise, twin" in err


@SLOW
def test_eval_prints_the_score_that_the_run_reports(fopd: Fopd, tmp_path: Path) -> None:
    recipe = small_recipe(
        TINY,
        task={"horizon": 3, "eval_prompts": 40},
        sampler={"max_new_tokens": 30, "concurrency": 16},
        eval={"samples": 2},
        learner={"steps": 3, "batch_samples": 8, "lr": 1e-3},
    )
    run = fopd.run(recipe)
    out = json.loads(fopd("eval", run, "--out", tmp_path / "generations.jsonl").out)
    assert out["score"] == summary(run)["score_last"] > 0
    assert out["score_error"] == pytest.approx(summary(run)["score_last_error"])
    file = tmp_path / "generations.jsonl"
    rows = lines(file)[1:]  # a header comes first
    assert len(rows) == 80
    assert np.mean([r["score"] for r in rows]) == pytest.approx(out["score"])
    # Cut off in the middle of a row: what is missing is done, by two processes.
    whole = file.read_text()
    file.write_text("".join(f"{line}\n" for line in whole.splitlines()[:38]) + whole.splitlines()[38][:40])
    again = json.loads(fopd("eval", run, "--out", file, "--jobs", "2").out)
    assert again["already_done"] == 37
    assert again["score"] == out["score"]
    assert [r["response"] for r in lines(file)[1:]] == [r["response"] for r in rows]
    assert (
        "is of another model"
        in fopd("eval", TINY / "teacher", "--task", fopd.folder / "run.yaml", "--out", file, code=2).err
    )
    assert "--generate-only: give --out" in fopd("eval", run, "--generate-only", code=2).err
    teacher = json.loads(
        fopd("eval", TINY / "teacher", "--task", fopd.folder / "run.yaml", "--samples", "1").out
    )
    assert teacher["score"] > out["score"]


@SLOW
def test_students_that_differ_from_their_teacher_in_padding(fopd: Fopd, tmp_path: Path) -> None:
    """Qwen's case: one tokenizer, vocabularies padded to 151,936 and 152,064."""
    import torch
    from transformers import AutoModelForCausalLM

    pair = make_pair(tmp_path / "padded", "qwen3")
    model = AutoModelForCausalLM.from_pretrained(pair / "teacher", dtype=torch.float32)
    model.resize_token_embeddings(272)
    model.save_pretrained(pair / "teacher")
    s = summary(fopd.run(small_recipe(pair)))
    assert s["kl_last"] < s["kl_first"]


@SLOW
def test_quickstart_learns(fopd: Fopd) -> None:
    """The recipe that the README makes promises about."""
    fopd("run", TINY.parent / "quickstart.yaml", "--run-dir", fopd.folder / "q")
    s = summary(fopd.folder / "q")
    assert s["score_first"] < 0.3
    assert s["score_last"] > 0.7
    check_accounts(fopd.folder / "q")
