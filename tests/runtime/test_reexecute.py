"""Supervision drift: contexts rebuilt from today's environment and judged again; and teacher-only context."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SLOW, TINY, Fopd, check_accounts, lines, metrics, small_recipe, summary
from learner_kit import CPU, VOCAB
from tool_kit import TOOL, needs_sandbox, tool_recipe

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.errors import UserError
from fopd_cli.freshness import drift
from fopd_cli.runtime.crew.roles import score
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.runtime.memory.shared import shared_bytes
from fopd_cli.samples import Prompt, Rollout, TargetSpec
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.privileged import told
from fopd_cli.tasks.replay import Replay, judged_context, realigned, replay, same
from fopd_cli.tasks.tool import scripted


def rollout(turns: list[tuple[int, int]], ids: list[int], prompt: int = 2) -> Rollout:
    n = len(ids) - prompt
    mask = np.zeros(n, dtype=bool)
    for start, stop in turns:
        mask[start:stop] = True
    return Rollout(
        0, np.array(ids, np.int32), prompt, mask, np.zeros(n, np.float32), [(0, 0, n)], "stop", turns=turns
    )


# ---- alignment ---------------------------------------------------------------------------------------------


def test_the_current_context_holds_every_sampled_token_once() -> None:
    r = rollout([(0, 2), (4, 7), (8, 9)], [1, 2, 10, 11, 90, 91, 12, 13, 14, 92, 15])
    seen = [np.array([80]), np.array([81, 82, 83])]
    context = realigned(r, np.array([5, 6, 7]), seen)
    assert context.token_ids.tolist() == [5, 6, 7, 10, 11, 80, 12, 13, 14, 81, 82, 83, 15]
    at = context.positions[r.loss_mask]
    assert np.array_equal(context.token_ids[at], r.response_ids[r.loss_mask])
    assert (context.positions[~r.loss_mask] == -1).all(), "observations are not judged"


def test_turns_that_the_environment_no_longer_answers_have_no_context() -> None:
    r = rollout([(0, 2), (4, 7), (8, 9)], [1, 2, 10, 11, 90, 91, 12, 13, 14, 92, 15])
    context = realigned(r, np.array([1, 2]), [np.array([90, 91])])
    assert context.token_ids.tolist() == [1, 2, 10, 11, 90, 91, 12, 13, 14]
    assert context.positions.tolist() == [2, 3, -1, -1, 6, 7, 8, -1, -1]
    whole = realigned(r, np.array([1, 2]), [np.array([90, 91]), np.array([92])])
    assert same(whole, judged_context(r, None))
    assert not same(context, judged_context(r, None))
    assert same(
        realigned(r, np.array([7]), [np.array([90, 91]), np.array([92])]), judged_context(r, np.array([7]))
    )


def test_a_replay_executes_the_turns_again_or_asks_the_task() -> None:
    class Counting:
        """Ends after its second turn."""

        def __init__(self) -> None:
            self.closed = 0

        def episode(self, prompt: Prompt, now: int) -> Any:
            outer, count = self, iter(range(9))

            class Own:
                async def observe(self, turn: str) -> Observation:
                    n = next(count)
                    return Observation(None if n == 2 else f"{turn}{n} at {now}")

                async def close(self) -> None:
                    outer.closed += 1

            return Own()

    task, prompt = Counting(), Prompt(0, text="q")
    found = asyncio.run(replay(task, prompt, ["a", "b", "c", "d", "e"], 7))
    assert [o.text for o in found.observations] == ["a0 at 7", "b1 at 7"]
    assert task.closed == 1

    class Looking(Counting):
        async def replay(self, prompt: Prompt, turns: list[str], now: int) -> Replay:
            return Replay(Prompt(0, text=f"q{now}"), [Observation("looked up")])

    assert asyncio.run(replay(Looking(), prompt, ["a", "b"], 3)).prompt.text == "q3"


# ---- the teacher's drift -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("hidden", 128), ("topk", 4), ("topk", VOCAB), ("sampled", 1)])
def test_supervision_drift_against_float64(kind: Any, width: int) -> None:
    """Exact from hidden states, or with k as large as the vocabulary; a lower bound otherwise."""
    model = hf.load_model(str(TOOL / "teacher"), "teacher", torch.float32)
    teacher = TransformersTeacher(model, CPU, 1, 4096, VOCAB, 64, packing=False)
    tokenizer = hf.load_tokenizer(str(TOOL / "teacher"), "teacher")
    question = "37*52+18="
    pieces = [
        tokenizer(text)["input_ids"] for text in (question, *scripted(question), "\n```output\n77\n```\n")
    ]
    asked, call, seen, answer, otherwise = pieces
    ids, n = [*asked, *call, *seen, *answer], len(call) + len(seen) + len(answer)
    r = rollout([(0, len(call)), (len(call) + len(seen), n)], ids, len(asked))
    later = replace(r, context=realigned(r, np.array(asked), [np.array(otherwise)]))
    changed, positions = later.judged.token_ids, later.judged.positions
    spec = TargetSpec(kind, width, torch.float32, reexecuted=True)
    targets = targets_at(shared_bytes(spec.nbytes(n)), 0, spec, n)
    score(teacher, [r], [targets])
    assert targets.drift is not None
    assert targets.aligned is not None
    assert (targets.drift == 0).all()
    assert targets.aligned.all()
    before = copy.deepcopy(targets)
    score(teacher, [later], [targets], again="current")

    def full(tokens: np.ndarray) -> torch.Tensor:
        return torch.log_softmax(
            model(torch.from_numpy(tokens).long()[None]).logits[0, :, :VOCAB].double(), -1
        )

    with torch.no_grad():
        now, then = full(changed), full(r.token_ids)
    own = np.flatnonzero(r.loss_mask)
    exact = drift.exact(now[positions[own] - 1], then[own + len(asked) - 1]).float()
    found, first = targets.drift[own], len(call)
    assert targets.aligned.tolist() == (positions >= 0).tolist()
    assert (targets.drift[~r.loss_mask] == 0).all()
    assert found[:first].abs().max() < 1e-6, "before the change nothing drifted"
    assert exact[first:].max() > 1, "the digits of the answer"
    if width in (128, VOCAB):
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-3)
    else:
        assert (found <= exact + 1e-5).all()
        assert found[first:].max() > 0.1
    # The labels themselves are those of the new context, as from a fresh scoring of only that.
    m = len(changed) - len(asked)
    alone = rollout([(0, m)], changed.tolist(), len(asked))
    again = targets_at(shared_bytes(spec.nbytes(m)), 0, spec, m)
    score(teacher, [alone], [again])
    name = "hidden" if kind == "hidden" else "logprobs"
    labels = getattr(targets, name)[own]
    torch.testing.assert_close(
        labels, getattr(again, name)[positions[own] - len(asked)], atol=1e-4, rtol=1e-4
    )
    assert not torch.equal(labels, getattr(before, name)[own])
    # With cached labels, the same drift comes with the labels of the context that the student has read.
    kept = targets_at(shared_bytes(spec.nbytes(n)), 0, spec, n)
    score(teacher, [r], [kept])
    score(teacher, [later], [kept], again="cached")
    for field in spec.fields(n):
        expected = targets if field[0] in ("drift", "aligned") else before
        assert torch.equal(getattr(kept, field[0]), getattr(expected, field[0])), field[0]


def test_overlap_merges_what_only_one_side_names() -> None:
    """Against the same classes by hand."""
    new, old = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.6, 0.1]]).log()
    found = drift.overlap(new, torch.tensor([[3, 8]]), old, torch.tensor([[5, 3]]))
    expected = 0.5 * np.log(0.5 / 0.1) + 0.5 * np.log(0.5 / 0.9)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    nothing = drift.overlap(new, torch.tensor([[3, 8]]), old, torch.tensor([[5, 6]]))
    assert nothing.item() == pytest.approx(0, abs=1e-6)


# ---- whole runs --------------------------------------------------------------------------------------------


def drifting(lag: int, drift: float, **changes: Any) -> dict[str, Any]:
    """A student that makes many calls right (the teacher itself), at an exact lag."""
    recipe = tool_recipe(
        task={"drift": drift, "eval_prompts": 2, "max_turns": 3},
        schedule={"lag": lag},
        learner={"steps": 5, "batch_samples": 8, "lr": 1e-6, "warmup_steps": 0},
        freshness={
            "policy": "reweight",
            "xi": 0.0,
            "reexecute": {"share": 1.0},
            **changes.pop("freshness", {}),
        },
        **changes,
    )
    recipe["student"]["model"] = str(TOOL / "teacher")
    return recipe


def supervision(run: Path) -> list[float]:
    return [r["drift_sup"] for r in metrics(run) if r["kind"] == "step"]


def cost(run: Path, name: str) -> float:
    """A whole run's total: which step a re-execution is booked on depends on the clock."""
    return sum(r["timing"][name] for r in lines(run / "metrics.jsonl") if r["kind"] == "step")


@SLOW
@needs_sandbox
def test_a_tool_that_drifts_is_measured_and_one_that_does_not_is_not(fopd: Fopd) -> None:
    """More drift with more lag; with a deterministic tool exactly 0, and nothing is scored again."""
    still = fopd.run(drifting(3, 0.0), "still")
    assert supervision(still) == [0.0] * 5
    assert cost(still, "replayed") == 3 * 8, "the first batch has no lag, the second none before its step"
    assert cost(still, "replayed_changed") == 0
    assert cost(still, "replay_seconds") > 0
    runs = {lag: fopd.run(drifting(lag, 0.3), f"lag{lag}") for lag in (1, 2, 4)}
    curve = {lag: supervision(run)[-1] for lag, run in runs.items()}
    assert 0 == curve[1] < curve[2] < curve[4]
    last = [r for r in metrics(runs[4]) if r["kind"] == "step"][-1]
    assert last["coverage_sup"] == 1.0, "a drifting tool still answers"
    assert last["freshness"] < 1 / 5, "older and drifted, by equation 11"
    assert cost(runs[4], "replayed_changed") > 0
    without = fopd.run(drifting(4, 0.3, freshness={"policy": "lag_weight"}), "without")
    assert supervision(without) == [0.0] * 5
    assert cost(without, "replayed") == 0, "a policy without freshness reexecutes nothing"


@SLOW
@needs_sandbox
def test_reexecutions_of_an_asynchronous_run(fopd: Fopd) -> None:
    """No fixed lag: samples are reexecuted as they become ready, and the accounts stay exact."""
    recipe = drifting(0, 0.5)
    recipe["schedule"] = {"max_lag": 3}
    recipe["learner"]["steps"] = 8
    run = fopd.run(recipe)
    check_accounts(run)
    assert 0 < cost(run, "replayed_changed") <= cost(run, "replayed") <= 8 * 8
    assert max(supervision(run)) > 0


@SLOW
@needs_sandbox
def test_a_drifted_sample_teaches_what_the_student_has_read_unless_told_otherwise(fopd: Fopd) -> None:
    """The student is the teacher: on the context that both have read, there is nothing to learn."""
    all_of_it = {"share": 1.0}
    kept, current = (
        [
            r["kl"]
            for r in metrics(
                fopd.run(drifting(4, 0.9, freshness={"reexecute": {**all_of_it, "labels": labels}}), labels)
            )
            if r["kind"] == "step"
        ]
        for labels in ("cached", "current")
    )
    assert max(kept) < 1e-4
    assert max(current) > 0.1


@SLOW
@needs_sandbox
def test_two_runs_with_reexecutions_are_bitwise_the_same_and_the_budget_holds(fopd: Fopd) -> None:
    recipe = drifting(2, 0.5, freshness={"reexecute": {"share": 0.25}})
    first, second = (fopd.run(recipe, name) for name in ("a", "b"))
    assert metrics(first) == metrics(second)
    assert cost(first, "replayed") == 3 * 2


# ---- what only the teacher is told -------------------------------------------------------------------------


def test_the_template_fills_in_columns_and_leaves_other_braces_alone() -> None:
    plain = Prompt(3, text="1+1=", payload={"answer": "2", "solution": None})
    assert told(plain, r"{question} \frac{1}{2} {answer}").text == r"1+1= \frac{1}{2} 2"
    chat = Prompt(
        0,
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        payload={"hint": "h"},
    )
    assert told(chat, "{question} ({hint})").messages == [
        chat.messages[0],
        {"role": "user", "content": "q (h)"},
    ]
    with pytest.raises(UserError, match=r"prompt 3 has no column 'solution'; it has question, answer"):
        told(plain, "{solution}")


@SLOW
def test_a_teacher_that_is_told_more_judges_otherwise(fopd: Fopd) -> None:
    """The whole path: another prompt for the teacher, the same for the student."""
    base = small_recipe(TINY, learner={"steps": 2})
    hinted = small_recipe(TINY, learner={"steps": 2}, teacher={"context": "{solution}\n{question}"})
    runs = [fopd.run(recipe, name) for recipe, name in ((base, "base"), (hinted, "hinted"))]
    shown = [lines(run / "samples.jsonl")[0] for run in runs]
    assert shown[0]["prompt"] == shown[1]["prompt"], "the student does not see it"
    assert shown[0]["response"] == shown[1]["response"]
    kl = [summary(run)["kl_first"] for run in runs]
    assert kl[1] != pytest.approx(kl[0], rel=0.01)
    wrong = small_recipe(TINY, teacher={"context": "{nothing}"})
    err = fopd("run", fopd.recipe(wrong), "--run-dir", fopd.folder / "wrong", code=2).err
    assert "teacher.context: prompt 0 has no column 'nothing'" in err
