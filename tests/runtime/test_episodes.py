"""Conversations with an environment: tokens, turns, tools."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SLOW, Fopd, check_accounts, lines, metrics, reach, summary, wait_for
from run_kit import checkpoints, worker
from task_kit import built
from tool_kit import needs_sandbox, tool_recipe
from transformers import AutoTokenizer

from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.runtime.journal.buffer_file import load_buffer, rollout_fields, write_buffer
from fopd_cli.runtime.memory.held import Held
from fopd_cli.runtime.scheduling.episodes import Episodes
from fopd_cli.samples import Prompt, Request, Rollout, SamplingParams
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.tool import PYTHON_TOOL, Tool, parse, scripted


def turn(request: Request, ids: list[int], version: int, finish: str = "stop", k: int = 0) -> Rollout:
    n = len(ids)
    extra: dict[str, Any] = {}
    if k:
        extra = {"topk_logprobs": np.full((n, k), -1.5, np.float32), "topk_ids": np.ones((n, k), np.int32)}
    return Rollout(
        request.key,
        np.concatenate([request.token_ids, np.array(ids, np.int32)]),
        len(request.token_ids),
        np.ones(n, bool),
        np.full(n, -0.5, np.float32),
        [(version, 0, n)],
        finish,
        **extra,
    )


def test_turns_and_observations_become_one_rollout(tmp_path: Path) -> None:
    """What was sampled and observed is only ever appended; observations carry no loss and have the version of
    the turn before.
    """
    episodes = Episodes()
    first = Request(7, np.array([1, 2, 3], np.int32), 11, SamplingParams(max_new_tokens=20))
    episodes.start(first, replica=0)
    one = episodes.on_turn(turn(first, [10, 11], 4, k=2))
    assert one is not None
    assert episodes.on_observed(7, one.number, np.array([20, 21, 22], np.int32), [{"tool": "python"}]) is one
    second = episodes.next_turn(one)
    assert second is not None
    assert second.token_ids.tolist() == [1, 2, 3, 10, 11, 20, 21, 22]
    assert second.params.max_new_tokens == 15
    assert second.seed != first.seed
    episodes.on_turn(turn(second, [30], 5, k=2))
    rollout = episodes.finish(one)
    assert not episodes.running
    assert rollout.token_ids.tolist() == [1, 2, 3, 10, 11, 20, 21, 22, 30]
    assert rollout.prompt_length == 3
    assert rollout.loss_mask.tolist() == [True, True, False, False, False, True]
    assert np.isnan(rollout.logprobs).tolist() == [False, False, True, True, True, False]
    assert rollout.spans == [(4, 0, 5), (5, 5, 6)]
    assert rollout.turns == [(0, 2), (5, 6)]
    assert rollout.last_turn.tolist() == [30]
    assert rollout.topk_ids is not None
    assert rollout.topk_ids.shape == (6, 2)
    assert rollout.oldest_version == 4
    write_buffer(tmp_path / "b", [rollout], Held(np.empty(0, np.uint8), {}))
    ((again,), _) = load_buffer(tmp_path / "b", json.loads(json.dumps(rollout_fields([rollout]))))
    assert (again.turns, again.calls, again.spans) == (rollout.turns, rollout.calls, rollout.spans)


def test_the_budget_is_for_the_whole_episode() -> None:
    episodes = Episodes()
    first = Request(0, np.array([1], np.int32), 11, SamplingParams(max_new_tokens=6))
    episodes.start(first, 0)
    one = episodes.on_turn(turn(first, [5, 6, 7], 0))
    assert one is not None
    episodes.on_observed(0, one.number, np.array([9, 9, 9], np.int32), [])
    assert episodes.next_turn(one) is None
    rollout = episodes.finish(one)
    assert rollout.token_ids.tolist() == [1, 5, 6, 7]  # an unanswered observation is not part of it
    assert rollout.turns == [(0, 3)]


def test_answers_to_episodes_that_were_given_up_are_ignored() -> None:
    episodes = Episodes()
    first = Request(3, np.array([1], np.int32), 11, SamplingParams(max_new_tokens=9))
    episodes.start(first, 0)
    old = episodes.on_turn(turn(first, [5], 0))
    assert old is not None
    assert episodes.drop([3, 4]) == [3]
    assert episodes.on_turn(turn(first, [5], 0)) is None
    episodes.start(first, 1)  # the same sample once more
    assert episodes.on_observed(3, old.number, np.array([9], np.int32), []) is None


# A template in the style of Qwen3: it shows what an assistant thought only in its last turn.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in m['content'] %}{{ "
    "m['content'].split('</think>')[1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_token_in_token_out_with_a_template_that_forgets(pair: Path) -> None:
    """The reasoning of earlier turns stays in the tokens, although the template would leave it out."""
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    tokenizer.chat_template = FORGETFUL
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    thought = tokenizer("<think>hm</think>```python\n1\n```<|im_end|>", add_special_tokens=False)["input_ids"]
    seen = hf.encode_observation(tokenizer, "1", "user", chat=True)
    assert tokenizer.decode(seen) == "\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    episodes = Episodes()
    first = Request(0, np.array([1], np.int32), 11, SamplingParams(max_new_tokens=500))
    episodes.start(first, 0)
    one = episodes.on_turn(turn(first, thought, 0))
    assert one is not None
    episodes.on_observed(0, one.number, seen, [])
    following = episodes.next_turn(one)
    assert following is not None
    assert "<think>hm</think>" in tokenizer.decode(following.token_ids)
    talk = [{"role": "assistant", "content": "<think>hm</think>x"}, {"role": "user", "content": "1"}]
    assert "<think>" not in tokenizer.apply_chat_template(talk, tokenize=False)


def test_an_observation_cannot_speak_in_special_tokens(pair: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    for chat in (True, False):
        ids = hf.encode_observation(tokenizer, "<eos><assistant>", "user", chat)
        assert 1 not in ids.tolist()
        assert ids.tolist().count(3) == int(chat)  # the template's own
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="does not show messages of role"):
        hf.encode_observation(tokenizer, "x", "tool", True)


# ---- the tool task -----------------------------------------------------------------------------------------


def test_calls_are_found_in_both_notations() -> None:
    assert parse("so\n```python\nx = 1\n```\nor\n```py\nx\n```", "code") == [("x = 1\n", None), ("x\n", None)]
    assert parse("the answer is ```7```", "code") == []
    call = '<tool_call>\n{"name": "python", "arguments": {"code": "1+1"}}\n</tool_call>'
    assert parse(call, "native") == [("1+1", None)]
    for wrong in (
        "{",
        '{"name": "bash", "arguments": {"code": "ls"}}',
        '{"name": "python", "arguments": "1"}',
        "[]",
    ):
        ((_, problem),) = parse(f"<tool_call>{wrong}</tool_call>", "native")
        assert problem


def converse(task: Tool, *turns: str) -> list[Observation]:
    async def go() -> list[Observation]:
        episode = task.episode(Prompt(0, text="q"), 0)
        try:
            return [await episode.observe(t) for t in turns]
        finally:
            await episode.close()

    return asyncio.run(go())


def code(source: str) -> str:
    return f"```python\n{source}\n```"


@needs_sandbox
def test_an_episode_with_an_interpreter() -> None:
    task = built(
        "tool", max_calls=3, max_turns=6, wall_s=4, observation_chars=100, train_prompts=10, eval_prompts=4
    )
    found = converse(
        task,
        code("x = 6 * 7"),
        code("print(x); 1/0"),
        code("print('a' * 500)"),
        code("x"),
        "it is \\boxed{42}",
    )
    assert found[0].text == "\n```output\n\n```\n"
    assert "42" in str(found[1].text)
    assert "ZeroDivisionError" in found[1].calls[0]["output"]
    assert "400 characters left out" in str(found[2].text)
    assert "no more than 3 calls" in str(found[3].text)
    assert found[4] == Observation(None)
    assert [o.calls[0]["ok"] for o in found[:4]] == [True, False, True, False]
    (slow, after) = converse(task, code("import time; time.sleep(9)"), code("1"))
    assert "longer than 4 s" in str(slow.text)
    assert after.calls[0]["ok"]
    patient = built("tool", max_calls=9, max_turns=2, train_prompts=10, eval_prompts=4)
    assert (
        converse(patient, code("1"), code("2"))[1].text is None
    )  # the last turn is the answer, whatever it says


@needs_sandbox
def test_questions_grades_and_the_script() -> None:
    task = built("tool", train_prompts=50, eval_prompts=20)
    train, held_out = task.prompts("train"), task.prompts("eval")
    assert not {p.text for p in train} & {p.text for p in held_out}
    for prompt in train[:5]:
        call, observation, answer = scripted(str(prompt.text))
        assert converse(task, call)[0].text == observation
        assert task.grade(prompt, answer) == 1
        assert task.grade(prompt, "\\boxed{x}") == task.grade(prompt, answer[:-1]) == 0
    with pytest.raises(UserError, match="only 243 questions"):
        built("tool", terms=2, digits=1, train_prompts=20_000)


def test_native_calls_come_with_the_tools_description(tmp_path: Path) -> None:
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "1+2?", "answer": "3"}\n')
    task = built("tool", train=str(rows), eval=str(rows), notation="native", sandbox="none", eval_prompts=1)
    (prompt,) = task.prompts("eval")
    assert prompt.tools == [PYTHON_TOOL]
    assert task.grade(prompt, "so it is \\boxed{2}") == 1
    (found,) = converse(task, '<tool_call>{"name": "python", "arguments": {"code": "40 + 2"}}</tool_call>')
    assert (found.text, found.role) == ("42", "tool")
    with pytest.raises(UserError, match="plain text and have no native calls"):
        built("tool", notation="native", sandbox="none")


# ---- whole runs --------------------------------------------------------------------------------------------


@SLOW
@needs_sandbox
def test_two_synchronous_runs_with_tools_are_bitwise_the_same(fopd: Fopd) -> None:
    """Even though tools answer in any order; the same holds for one killed mid-episode and resumed."""
    first, second = (fopd.run(tool_recipe(), name) for name in ("a", "b"))
    assert metrics(first) == metrics(second)
    prompts = check_accounts(first)
    assert prompts["trained"] + prompts["gated"] == 4 * 8
    steps = [r for r in metrics(first) if r["kind"] == "step"]
    assert steps[0]["calls"] > 0.5
    assert steps[0]["turns"] > 1.5
    assert 0 <= steps[0]["invalid_calls"] <= 1
    shown = next(r for r in lines(first / "samples.jsonl") if r["calls"])
    assert shown["calls"][0].keys() >= {"tool", "input", "output", "ok", "seconds"}
    assert len(shown["turns"]) >= 2


@SLOW
@needs_sandbox
def test_killed_in_the_middle_of_episodes(fopd: Fopd) -> None:
    recipe = tool_recipe(learner={"steps": 6, "batch_samples": 8, "lr": 1e-3, "warmup_steps": 0})
    whole = fopd.run(recipe, "whole")
    process = fopd.start("run", fopd.recipe(recipe, "cut.yaml"), "--run-dir", fopd.folder / "cut")
    reach(process, fopd.folder / "cut", 3)
    wait_for(lambda: checkpoints(fopd.folder / "cut"), "a checkpoint, which is written beside the next steps")
    process.kill()
    process.communicate()
    fopd("resume", fopd.folder / "cut")
    assert metrics(fopd.folder / "cut")[-1] == metrics(whole)[-1]
    check_accounts(fopd.folder / "cut")


@SLOW
@needs_sandbox
def test_asynchronous_episodes_and_a_lost_environment(fopd: Fopd) -> None:
    """Its episodes start over in a new one. If no new one may be started, the run ends with a checkpoint.

    The sampler is paused in the meantime, so that it finishes a token, and in a large batch some turn, after
    it was told to abort them. None of that may get into the second attempt of the episodes.
    """
    recipe = tool_recipe(
        schedule={"max_lag": 2},
        sampler={"concurrency": 32},
        learner={"steps": 12, "batch_samples": 16, "lr": 1e-3, "warmup_steps": 0},
        teacher={"delay_ms": 20},
        runtime={"restarts": 3},
    )
    process, run = (
        fopd.start("run", fopd.recipe(recipe, "r.yaml"), "--run-dir", fopd.folder / "r"),
        fopd.folder / "r",
    )
    for step in (1, 3, 5):
        reach(process, run, step)
        sampler, environment = (worker(run, name, process.pid) for name in ("sampler-0", "environment-0"))
        sampler.suspend()
        environment.kill()
        time.sleep(0.5)
        sampler.resume()
    reach(process, run, 7)
    worker(run, "environment-0", process.pid).kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert "environment-0" in err
    assert "restarting it (3 of 3)" in err
    assert "there is no other environment" in err
    fopd("resume", run)
    prompts = check_accounts(run)
    assert prompts["trained"] + prompts["gated"] == 12 * 16
    assert summary(run)["max_lag"] <= 2
    assert summary(run)["restarts"] == 3


@SLOW
@needs_sandbox
def test_a_student_learns_to_use_the_tool(fopd: Fopd) -> None:
    recipe = tool_recipe(
        task={"train_prompts": 6000, "eval_prompts": 96},
        sampler={"max_new_tokens": 160, "concurrency": 64},
        learner={"steps": 32, "batch_samples": 64, "lr": 2e-3, "warmup_steps": 5, "decay": "cosine"},
        teacher={"batch_samples": 16},
        schedule={"max_lag": 2},
        freshness={"xi": 0.02},
        checkpoint={"every": 30},
    )
    run = fopd.folder / "run"
    fopd("run", fopd.recipe(recipe), "--run-dir", run, timeout=1800)
    s = summary(run)
    # 45 steps take the score from 0.17 to 0.58 and the KL from 0.46 to 0.16; the KL has the smaller noise.
    assert s["score_last"] > s["score_first"] + 0.1, s
    assert s["kl_last"] < 0.7 * s["kl_first"], s
    last = [r for r in metrics(run) if r["kind"] == "step"][-1]
    assert last["calls"] > 0.9
    assert last["invalid_calls"] < 0.1
    check_accounts(run)
    score = json.loads(fopd("eval", run).out)["score"]
    assert score == pytest.approx(s["score_last"], abs=0.1)
