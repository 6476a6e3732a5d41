"""The coding agent: mini-SWE-agent's loop around turns of ours, repositories in the sandbox, their own tests
as the judge.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SLOW, Fopd, check_accounts, lines, metrics, summary
from task_kit import built
from tool_kit import PROBLEM

from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt
from fopd_cli.sandbox.limits import Limits
from fopd_cli.sandbox.process import occupied, run
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.swe import generated
from fopd_cli.tasks.swe.instances import official_image
from fopd_cli.tasks.swe.task import Swe

pytest.importorskip("minisweagent")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
TINY_AGENT = str(ROOT / "recipes" / "tiny-swe" / "agent.yaml")


def tiny(**options: Any) -> Swe:
    return built(
        "swe", **{"scaffold": TINY_AGENT, "chat": False, "train_prompts": 20, "eval_prompts": 6, **options}
    )


def play(task: Swe, prompt: Prompt, turns: list[str]) -> list[Observation]:
    async def go() -> list[Observation]:
        episode, seen = task.episode(prompt, 0), []
        try:
            for turn in turns:
                seen.append(await episode.observe(turn))
                if seen[-1].text is None:
                    break
        finally:
            await episode.close()
        return seen

    return asyncio.run(go())


def sh(command: str) -> str:
    return f"```sh\n{command}\n```"


def left_behind() -> set[str]:
    return {p.name for p in Path(tempfile.gettempdir()).glob("fopd-swe-*")}


def test_a_scripted_agent_resolves_all_and_one_that_does_nothing_none() -> None:
    task, before = tiny(), left_behind()
    for prompt in task.prompts("eval"):
        steps = generated.scripted(prompt.payload["instance"])
        seen = play(task, prompt, [sh(command) for command, _ in steps])
        assert [o.text for o in seen] == [f"\n0\n{output}" for _, output in steps[:-1]] + [None]
        assert [c["ok"] for o in seen for c in o.calls] == [True] * 3
        answer = seen[-1].answer
        assert answer is not None
        assert answer.startswith("diff --git")
        grade = task.grade(prompt, answer)
        assert (grade.score, grade.metrics["regression"]) == (1.0, 0.0)
        idle = play(task, prompt, [sh("true"), sh(generated.SUBMIT)])[-1].answer
        assert idle == ""
        assert task.grade(prompt, idle).metrics == {"submitted": 0.0}
        assert task.grade(prompt, idle).score == 0.0
    assert left_behind() == before


def test_generated_instances_are_distinct_and_held_out_ones_do_not_depend_on_the_rest() -> None:
    few, many = (generated.instances("eval", n, 0, 8) for n in (10, 500))
    assert few == many
    train = generated.instances("train", 500, 0, 8)
    assert len({i.id for i in (*train, *few)}) == 508
    assert len({len(i.files or {}) for i in train}) == 2, "one module or two"


def test_what_a_patch_is_judged_by() -> None:
    """A fix that breaks something else, a fix of the tests, one that does not apply, one that is no patch."""
    task = tiny()
    prompt = next(p for p in task.prompts("train") if len(p.payload["instance"].pass_to_pass) == 3)
    made = prompt.payload["instance"]
    fix = generated.scripted(made)[1][0]
    other = next(name for name in generated.OPERATORS if f"test_{name}" in made.pass_to_pass[0])
    module = next(m for m in generated.MODULES if f"def {other}(" in made.files[m])

    def graded(*commands: str) -> dict[str, float]:
        answer = play(task, prompt, [*map(sh, commands), sh(generated.SUBMIT)])[-1].answer
        assert answer is not None
        grade = task.grade(prompt, answer)
        return {"score": grade.score, **grade.metrics}

    right = {"score": 1.0, "submitted": 1.0, "applied": 1.0, "regression": 0.0}
    assert graded(fix) == right
    broken = graded(fix, f"sed -i '/ {other}(/{{n;s#x.*#None#}}' {module}")
    assert broken == {**right, "score": 0.0, "regression": 1.0}
    cheat = "sed -i 's/assert .*/assert True/' tests/test_all.py"
    assert graded(cheat) == {**right, "score": 0.0}, "its tests are put back"
    hooked = (
        "printf 'import pytest\\n@pytest.hookimpl(hookwrapper=True)\\ndef "
        'pytest_runtest_makereport():\\n    o = yield\\n    o.get_result().outcome = "passed"\\n\' > '
        "conftest.py"
    )
    assert graded(hooked)["score"] == 0.0, "so is conftest.py"
    names = " ".join(f"PASSED {name}" for name in (*made.fail_to_pass, *made.pass_to_pass))
    prints = (
        "import atexit, os; atexit.register(lambda: os.write(1, "
        f"chr(10).join('{names}'.replace('PASSED', chr(10) + 'PASSED').split(chr(10))).encode()))"
    )
    assert graded(f"printf '%s\\n' \"{prints}\" >> {module}")["score"] == 0.0, "what is printed is no report"
    assert (
        task.grade(prompt, "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n").metrics["applied"]
        == 0.0
    )
    assert task.grade(prompt, "I am done.").metrics == {"submitted": 0.0}


def test_the_agents_own_rules_hold() -> None:
    """Errors of format are told, three in a row end it; so does the budget of turns; exit codes and limits
    are shown.
    """
    task = tiny(max_turns=4, wall_s=4.0)
    prompt = task.prompts("eval")[0]
    seen = play(task, prompt, ["no command", sh("true"), sh("exit 3"), sh("sleep 9")])
    assert "Expected exactly 1 action, found 0" in str(seen[0].text)
    assert [c["ok"] for c in seen[0].calls] == [False]
    assert seen[2].text == "\n3\n"
    assert (seen[3].text, seen[3].answer) == (None, ""), "the fourth turn is the last"
    assert "it took longer than 4 s" in seen[3].calls[0]["output"]
    assert play(task, prompt, ["a", "b", "c"])[-1].answer == ""
    waiting = play(task, prompt, [sh("cat")])
    assert waiting[0].text == "\n0\n", "there is nothing to wait for"
    odd = play(task, prompt, [sh("echo a\0b \ud800"), sh("echo " + 200_000 * "x"), sh("printf '\\0\\377'")])
    assert odd[0].text is not None
    assert odd[0].text.startswith("\n0\nab")
    assert "more than 100000 bytes" in str(odd[1].text)
    assert odd[2].text is not None


def test_what_an_agent_cannot_do() -> None:
    task = tiny(wall_s=5.0)
    prompt = task.prompts("eval")[0]
    hostile = [
        "rm -rf / 2>/dev/null; ls /root /work 2>&1; kill -9 -1; kill -9 1; exit 0",
        "env; hostname; cat /proc/1/environ | wc -c",
    ]
    seen = play(task, prompt, [*map(sh, hostile), sh("true")])
    assert os.getpid()
    assert str(Path.home()) not in str(seen[1].text)
    assert "API" not in str(seen[1].text)
    assert "sandbox" in str(seen[1].text)


def test_a_workspace_that_fills_up_is_stopped(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp") and parent != Path("/"):
            os.chmod(parent, 0o755)
    limits = Limits(wall_s=30, disk_mb=4, workspace_mb=8)
    fill = "for i in $(seq 2000); do head -c 1000000 /dev/zero > f$i; sleep 0.02; done"
    outcome = asyncio.run(run(["bash", "-c", fill], limits, tmp_path))
    assert outcome.reason == "disk"
    assert 8 << 20 < occupied(tmp_path) < 400 << 20


def test_an_episode_given_up_ends_its_command_at_once() -> None:
    task, before = tiny(wall_s=60.0), left_behind()

    async def go() -> float:
        episode = task.episode(task.prompts("eval")[0], 0)
        running = asyncio.ensure_future(episode.observe(sh("sleep 50")))
        await asyncio.sleep(1.0)
        running.cancel()
        began = time.monotonic()
        await episode.close()
        return time.monotonic() - began

    assert asyncio.run(go()) < 5
    assert left_behind() == before


def test_the_scaffolds_that_come_with_the_package() -> None:
    """SWE-bench's own prompts, and tool calls in the chat template's notation."""
    task = built("swe", train_prompts=2, eval_prompts=2)
    prompt = task.prompts("eval")[0]
    assert prompt.messages is not None
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert prompt.payload["problem"] in prompt.messages[1]["content"]
    assert "mswea_bash_command" in prompt.messages[1]["content"]
    seen = play(task, prompt, ["THOUGHT: look\n\n```mswea_bash_command\nls\n```"])
    assert "<returncode>0</returncode>" in str(seen[0].text)
    assert "a.py" in str(seen[0].text)
    native = built("swe", scaffold="swebench", notation="native", train_prompts=2, eval_prompts=2)
    prompt = native.prompts("eval")[0]
    assert prompt.tools[0]["function"]["name"] == "bash"
    call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls *.py"}}\n</tool_call>'
    seen = play(
        native,
        prompt,
        [f"Let me look.\n{call}", '<tool_call>{"name": "python", "arguments": {}}</tool_call>'],
    )
    assert seen[0].role == "tool"
    assert "a.py" in str(seen[0].text)
    assert "Unknown tool 'python'" in str(seen[1].text)


def test_parallel_calls_in_xml_and_thoughts() -> None:
    """Each call is executed, in order, and answered as a message of its own; what was only thought is not."""
    native = built("swe", scaffold="swebench", notation="native", train_prompts=2, eval_prompts=2)
    call = "<tool_call>\n<function=bash>\n<parameter=command>\n{}\n</parameter>\n</function>\n</tool_call>\n"
    thought = f"<think>{call.format('touch thought')}</think>"
    (seen,) = play(
        native,
        native.prompts("eval")[0],
        [thought + call.format("echo one > new") + call.format("ls; cat new")],
    )
    assert seen.role == "tool"
    assert seen.text is not None
    assert len(seen.text) == len(seen.calls) == 2
    assert "one" in seen.text[1]
    assert "thought" not in seen.text[1]
    task = built("swe", train_prompts=2, eval_prompts=2)
    turn = (
        "<think>```mswea_bash_command\ntouch thought\n```</think>THOUGHT: "
        "look\n\n```mswea_bash_command\nls\n```"
    )
    (seen,) = play(task, task.prompts("eval")[0], [turn])
    assert "a.py" in str(seen.text)
    assert "thought" not in str(seen.text)


def test_instances_in_the_columns_of_swe_bench(tmp_path: Path) -> None:
    """A directory of one's own, names of tests written as JSON, a test that the repository does not have
    yet.
    """
    repository = tmp_path / "repo"
    repository.mkdir()
    (repository / "code.py").write_text("def twice(x):\n    return x + 1\n")
    (repository / "test_old.py").write_text(
        "from code import twice\n\n\ndef test_one():\n    assert twice(1) == 2\n"
    )
    new = "from code import twice\n\n\ndef test_two():\n    assert twice(2) == 4\n"
    patch = (
        "diff --git a/test_new.py b/test_new.py\nnew file mode 100644\n--- /dev/null\n+++ "
        "b/test_new.py\n@@ -0,0 +1,5 @@\n"
    )
    patch += "".join(f"+{line}\n" for line in new.splitlines())
    row = {
        "instance_id": "me__repo-1",
        "problem_statement": "twice(2) is 3",
        "FAIL_TO_PASS": json.dumps(["test_new.py::test_two"]),
        "PASS_TO_PASS": ["test_old.py::test_one"],
        "test_patch": patch,
        "directory": "repo",
    }
    source = tmp_path / "instances.jsonl"
    source.write_text("".join(json.dumps({**row, "instance_id": f"me__repo-{i}"}) + "\n" for i in range(3)))
    task = tiny(train=str(source), eval=str(source), eval_prompts=1)
    assert [len(task.prompts(split)) for split in ("train", "eval")] == [2, 1]
    prompt = task.prompts("eval")[0]
    answer = play(task, prompt, [sh("sed -i 's/x + 1/2 * x/' code.py"), sh(generated.SUBMIT)])[-1].answer
    assert answer is not None
    assert task.grade(prompt, answer).score == 1.0
    worse = answer.replace("2 * x", "4")
    assert task.grade(prompt, worse).metrics["regression"] == 1.0
    assert (
        official_image("django__django-1")
        == "docker.io/swebench/sweb.eval.x86_64.django_1776_django-1:latest"
    )
    source.write_text(json.dumps({k: v for k, v in row.items() if k != "PASS_TO_PASS"}))
    with pytest.raises(UserError, match=r"row 1 of .* has no column 'PASS_TO_PASS'"):
        tiny(train=str(source), eval=str(source)).prompts("eval")


def test_a_users_mistakes() -> None:
    with pytest.raises(UserError, match=r"task.scaffold: 'nothing' is neither"):
        tiny(scaffold="nothing")
    with pytest.raises(UserError, match=r"task.train: is missing"):
        tiny(eval="x")
    made = tiny(sandbox="docker")
    contained = replace(made.instances("eval")[0], image=official_image("a__b-1"))
    with pytest.raises(UserError, match=r"task.sandbox: docker is not installed|cannot start"):
        made.workspace(contained)
    script = (
        "import sys; sys.modules['minisweagent'] = None\nfrom fopd_cli.tasks import "
        "load_task\nload_task('swe', {})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install --no-deps mini-swe-agent" in done.stderr


@SLOW
def test_a_coding_agent_in_training(fopd: Fopd) -> None:
    """Six steps of the recipe; and `fopd eval` in two halves gives the run's own score.

    Whether it learns takes 60 steps and more than one run to see: the KL of a few episodes that ramble
    outweighs all others (docs/benchmarks.md).
    """
    run = fopd.folder / "run"
    steps = ("--set", "learner.steps=6")
    fopd("run", ROOT / "recipes" / "swe-tiny.yaml", "--run-dir", run, *steps, timeout=900)
    done = summary(run)
    assert done["score_first"] > 0.2, "the student resolves some"
    assert 0 < done["kl_first"] < 1
    assert done["kl_last"] > 0
    assert done["collapsed"] in (True, False)
    check_accounts(run)
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert steps[0]["turns"] > 2
    assert steps[0]["score"] is None, "eval.training: false"
    last = [r for r in metrics(run) if r["kind"] == "eval"][-1]
    assert 0 < last["submitted"] <= 1
    assert 0 <= last["regression"] <= 1
    rows = fopd.folder / "rows.jsonl"
    generated_only = json.loads(fopd("eval", run, "--out", rows, "--generate-only").out)
    assert generated_only["score"] is None
    scored = json.loads(fopd("eval", run, "--out", rows, "--grade-only", "--jobs", "2").out)
    assert scored["score"] == pytest.approx(done["score_last"], abs=0.13)  # turns meet in other batches
    assert len(lines(rows)) == 49
