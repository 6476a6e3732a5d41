"""Whole runs on vLLM with the real command: learning, updates mid-rollout, lost engines, remote teachers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    SLOW,
    TINY,
    Fopd,
    check_accounts,
    descendants,
    lines,
    metrics,
    reach,
    small_recipe,
    steps_done,
    summary,
    wait_for,
)
from run_kit import gone, worker
from tool_kit import needs_sandbox, tool_recipe

from fopd_cli.engines.vllm import engine as vllm_engine

PROBLEM = vllm_engine.problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
KEY = "secret-of-the-test"


def vllm_recipe(pair: Path, **changes: Any) -> dict[str, Any]:
    changes.setdefault("sampler", {})
    changes["sampler"] = {"engine": "vllm", **changes["sampler"]}
    return small_recipe(pair, **changes)


@SLOW
def test_it_learns_as_on_transformers(fopd: Fopd) -> None:
    """The quickstart with sampler and teacher on vLLM and top-k targets; rollouts cross weight updates, and
    the noise floor is reported.
    """
    recipe = small_recipe(
        TINY,
        task={"horizon": 5, "difficulty": 2, "train_prompts": 6000, "eval_prompts": 128},
        sampler={"engine": "vllm", "max_new_tokens": 48, "concurrency": 64},
        teacher={"engine": "vllm", "batch_samples": 16},
        learner={"steps": 80, "batch_samples": 64, "lr": 2e-3, "warmup_steps": 10, "decay": "cosine"},
        schedule={"max_lag": 2, "inflight": "keep"},
        freshness={"xi": 0.02},
        checkpoint={"every": 60},
    )
    run = fopd.folder / "run"
    fopd("run", fopd.recipe(recipe), "--run-dir", run, timeout=1800)
    s = summary(run)
    assert s["score_last"] > s["score_first"] + 0.3, s
    assert s["kl_last"] < 0.2 * s["kl_first"]
    check_accounts(run)
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert max(r["versions_per_rollout"] for r in steps) > 1.05
    assert max(r["lag_max"] for r in steps) <= 2
    assert 0 <= steps[-1]["noise_floor"] < 1e-5
    timing = lines(run / "metrics.jsonl")[-2]["timing"]
    assert timing["load_ms"] > 0
    assert timing["load_gb_per_s"] > 0
    score = json.loads(fopd("eval", run).out)["score"]
    assert score == pytest.approx(s["score_last"], abs=0.05)


@SLOW
def test_adapters_alone_are_published(fopd: Fopd, pair: Path) -> None:
    """A LoRA student: vLLM keeps its base, and every step sends it A and B."""
    recipe = vllm_recipe(pair, learner={"steps": 8, "lr": 1e-2}, schedule={"max_lag": 1})
    recipe["student"]["lora"] = {"rank": 4, "alpha": 8, "publish": "adapter"}
    run = fopd.run(recipe)
    check_accounts(run)
    s = summary(run)
    assert s["kl_last"] < 0.9 * s["kl_first"]
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert max(r["drift_roll"] for r in steps if r["lag_max"] == 0) < 1e-5
    sent = [r["timing"]["publish_bytes"] for r in lines(run / "metrics.jsonl") if r["kind"] == "step"]
    assert 0 < sent[-1] < 0.2 * (pair / "student" / "model.safetensors").stat().st_size
    score = json.loads(fopd("eval", run).out)["score"]
    assert score == pytest.approx(s["score_last"], abs=0.3)


@SLOW
def test_hidden_states_out_of_vllm_teach_as_those_of_transformers(fopd: Fopd, pair: Path) -> None:
    """The same run twice, with the reverse KL over the whole vocabulary; only the teacher's engine differs,
    and so rounding.
    """

    def taught(engine: str) -> list[dict[str, Any]]:
        teacher = {"engine": engine, "targets": "hidden"}
        run = fopd.run(small_recipe(pair, teacher=teacher, loss={"kind": "reverse_kl"}), engine)
        used = yaml.safe_load((run / "recipe.yaml").read_text())
        assert used["teacher"]["engine"] == engine
        assert used["loss"]["support"] in ("auto", "full")
        check_accounts(run)
        return metrics(run)

    near, far = taught("transformers"), taught("vllm")
    steps = [(a, b) for a, b in zip(near, far, strict=True) if a["kind"] == "step"]
    assert len(steps) == 4
    for a, b in steps:
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    assert steps[-1][1]["kl"] < steps[0][1]["kl"]


@SLOW
@pytest.mark.parametrize("inflight", ["keep", "wait"])
def test_time_slicing(fopd: Fopd, pair: Path, inflight: str) -> None:
    """Engines take turns; a sampler that slept has no weights and loads the newest."""
    recipe = vllm_recipe(
        pair,
        teacher={"engine": "vllm", "k": 8},
        placement={"mode": "timeslice"},
        learner={"steps": 8},
        schedule={"max_lag": 1, "inflight": inflight},
    )
    run = fopd.run(recipe)
    check_accounts(run)
    assert summary(run)["max_lag"] == 1
    assert summary(run)["kl_last"] < summary(run)["kl_first"]


@SLOW
def test_killed_engines_are_replaced_and_kill_minus_nine_leaves_nothing(fopd: Fopd, pair: Path) -> None:
    recipe = vllm_recipe(
        pair,
        teacher={"engine": "vllm", "k": 8, "batch_samples": 4, "delay_ms": 10},
        learner={"steps": 400},
        schedule={"max_lag": 2},
    )
    run = fopd.folder / "run"
    process = fopd.start("run", fopd.recipe(recipe), "--run-dir", run)
    reach(process, run, 2)
    for name in ("sampler-0", "teacher-0"):
        worker(run, name, process.pid).kill()
        reached = steps_done(run)
        # More than the work already in flight can give.
        wait_for(lambda reached=reached: steps_done(run) >= reached + 6, f"steps after {name} was replaced")
    family = descendants(process.pid)
    process.kill()
    _, err = process.communicate()
    wait_for(lambda: gone(family), "everything to die with the conductor", 5.0)
    assert err.count("restarting it (1 of 2)") == 2
    fopd("resume", run, "--set", f"learner.steps={steps_done(run) + 2}")
    check_accounts(run)


@SLOW
def test_sigterm_to_all_processes_ends_with_a_checkpoint(fopd: Fopd, pair: Path) -> None:
    """As systemd and SLURM send it, also to processes of vLLM: the running step ends, and nothing is reported
    as lost.
    """
    recipe = vllm_recipe(
        pair,
        teacher={"engine": "vllm", "k": 8},
        learner={"steps": 400},
        schedule={"max_lag": 2},
        checkpoint={"every": 0},
    )
    run = fopd.folder / "run"
    process = fopd.start("run", fopd.recipe(recipe), "--run-dir", run)
    reach(process, run, 2)
    family = descendants(process.pid)
    for one in reversed(family):  # the conductor last: it learns about the others before its own
        one.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the run is ending" not in err
    wait_for(lambda: gone(family), "everything to end", 10.0)
    assert len(list((run / "checkpoints").glob("step-??????"))) == 1


@SLOW
def test_what_a_recipe_asks_in_vain_is_one_line(fopd: Fopd, pair: Path) -> None:
    def refusal(**changes: Any) -> str:
        name = f"r{len(list(fopd.folder.iterdir()))}"
        return fopd(
            "run", fopd.recipe(vllm_recipe(pair, **changes)), "--run-dir", fopd.folder / name, code=2
        ).err

    assert "does not divide the model's 3 attention heads" in refusal(
        sampler={"vllm": {"tensor_parallel": 2}}
    )
    long = {"max_new_tokens": 900, "vllm": {"kv_cache_gb": 0.0001}}
    assert "KV cache" in refusal(sampler=long)
    wrong = refusal(loss={"support": "full"}, teacher={"engine": "vllm"})
    assert "set loss.support: topk" in wrong


# ---- remote teachers ---------------------------------------------------------------------------------------


class Server:
    """A real `vllm serve` on loopback."""

    def __init__(self, model: Path, log: Path, *extra: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            "--served-model-name",
            "teacher",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "256",
            "--max-num-seqs",
            "16",
            "--kv-cache-memory-bytes",
            str(64 << 20),
            "--max-logprobs",
            "20",
            "--api-key",
            KEY,
            "--no-enable-prefix-caching",
            *extra,
        ]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_HOST_IP": "127.0.0.1",
        }
        self.process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def ready(self) -> bool:
        assert self.process.poll() is None, "the server died"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        """End it and everything it started."""
        family = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in family:
            if child.is_running():
                child.kill()


@pytest.fixture(scope="module")
def server(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(pair / "teacher", tmp_path_factory.mktemp("server") / "log")
    try:
        wait_for(running.ready, "the server", 180)
        yield running
    finally:
        running.stop()


def remote(server: Server, **changes: Any) -> dict[str, Any]:
    http = {"url": server.url, "api_key_env": "TEACHER_KEY", "retries": 1, **changes.pop("http", {})}
    return {"model": "teacher", "engine": "http", "k": 8, "batch_samples": 8, "http": http, **changes}


@SLOW
def test_a_remote_teacher_says_what_a_local_one_says(
    fopd: Fopd, pair: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run and samples, with top-k targets over HTTP and from the transformers engine."""
    monkeypatch.setitem(fopd.environment, "TEACHER_KEY", KEY)
    recipe = small_recipe(pair, loss={"support": "topk"})
    ours = {"model": str(pair / "teacher"), "k": 8, "batch_samples": 8}
    far, near = (
        fopd.run({**recipe, "teacher": remote(server)}, "far"),
        fopd.run({**recipe, "teacher": ours}, "near"),
    )
    check_accounts(far)
    for a, b in zip(metrics(far), metrics(near), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-5)


@SLOW
def test_what_is_wrong_with_a_remote_teacher_is_one_line(
    fopd: Fopd, pair: Path, llama_pair: Path, server: Server, tmp_path: Path
) -> None:
    def refusal(**changes: Any) -> str:
        recipe = {**small_recipe(pair), "teacher": remote(server, **changes)}
        return fopd("run", fopd.recipe(recipe), "--run-dir", fopd.folder / "never", code=2).err

    assert "the environment variable TEACHER_KEY is not set" in refusal()
    fopd.environment["TEACHER_KEY"] = "wrong"
    assert "refuses the API key" in refusal()
    fopd.environment["TEACHER_KEY"] = KEY
    assert "knows no model 'nobody'" in refusal(model="nobody")
    assert "max_logprobs" in refusal(k=64)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nothing = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        assert "failed 2 times" in refusal(http={"url": nothing})
    changed = tmp_path / "changed"
    subprocess.run(["cp", "-r", str(pair), str(changed)], check=True)
    tokenizer = changed / "student" / "tokenizer.json"
    vocabulary = json.loads(tokenizer.read_text())
    swapped = vocabulary["model"]["vocab"]
    swapped["2"], swapped["4"] = swapped["4"], swapped["2"]
    tokenizer.write_text(json.dumps(vocabulary))
    recipe = {**small_recipe(changed), "teacher": remote(server)}
    err = fopd("run", fopd.recipe(recipe), "--run-dir", fopd.folder / "never", code=2).err
    assert "has another tokenizer than the student" in err
    assert not (fopd.folder / "never").exists()


@SLOW
@needs_sandbox
def test_episodes_on_vllm(fopd: Fopd) -> None:
    """Turns go back into the continuous batch, and new weights arrive mid-episode."""
    recipe = tool_recipe(
        sampler={"engine": "vllm", "max_new_tokens": 120, "concurrency": 16},
        schedule={"max_lag": 2},
        learner={"steps": 5, "batch_samples": 8, "lr": 1e-3, "warmup_steps": 0},
    )
    run = fopd.run(recipe)
    steps = [r for r in metrics(run) if r["kind"] == "step"]
    assert steps[-1]["turns"] > 1.5
    assert steps[-1]["calls"] > 0.5
    assert max(r["noise_floor"] for r in steps) < 1e-4
    check_accounts(run)
