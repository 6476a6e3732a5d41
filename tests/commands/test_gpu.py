"""What only a CUDA device can show; skipped elsewhere. `scripts/gpu` runs it together with the benchmarks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, Fopd, check_accounts, small_recipe, summary

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.crew.publisher import Publisher
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.samples import Request, Rollout, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_sampler_gives_the_models_logprobs(pair: Path) -> None:
    sampler = on_weights(str(pair / "student"), torch.float32, torch.device("cuda"), concurrency=4)
    prompt = np.arange(4, 10, dtype=np.int32)
    sampler.submit([Request(i, prompt, i, SamplingParams(max_new_tokens=12)) for i in range(6)])
    rollouts: list[Rollout] = []
    while sampler.busy:
        rollouts += sampler.step()
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    for r in rollouts:
        with torch.no_grad():
            logits = model(torch.from_numpy(r.token_ids).long()[None]).logits[0, r.prompt_length - 1 : -1]
        y = torch.from_numpy(r.response_ids).long()[:, None]
        np.testing.assert_allclose(
            r.logprobs, torch.log_softmax(logits, -1).gather(-1, y)[:, 0].numpy(), atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learner_is_plain_pytorch(pair: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Even with a sleep in between, which moves everything to the host and back."""
    samples = kit.make_samples(pair)
    cfg = kit.config(compute_dtype=dtype)
    if dtype == torch.bfloat16 and not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/r", rank=0, world_size=1
        )
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    learner = FsdpLearner(model, [head], cfg, torch.device("cuda"), 0, 1)
    loss, _ = kit.reference(pair, samples, cfg)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    first = learner.train(0, samples)
    assert first.loss == pytest.approx(loss, rel=tolerance)
    learner.sleep()
    left = torch.cuda.memory_allocated()
    learner.wake()
    assert left < torch.cuda.memory_allocated()
    assert learner.train(1, samples).loss < first.loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_each_sequence_alone(pair: Path, dtype: torch.dtype) -> None:
    """bf16 goes through variable-length flash attention, with fewer key than query heads."""
    cuda, rng = torch.device("cuda"), np.random.Generator(np.random.PCG64(0))
    sequences = [rng.integers(4, 200, size=n).astype(np.int32) for n in (33, 1, 120, 7)]
    plain, packing = (hf.load_model(str(pair / "student"), "m", dtype) for _ in range(2))
    enable_packing(packing)
    expected = [TokenBatch.of([s], False, cuda).hidden(plain.to(cuda)) for s in sequences]
    found = TokenBatch.of(sequences, True, cuda).hidden(packing.to(cuda))
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)
    found.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in packing.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "changes", [{"compile": True}, {"offload": True}, {"optimizer_dtype": torch.bfloat16}], ids=str
)
def test_what_saves_time_or_memory_changes_no_loss(
    pair: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    samples = kit.make_samples(pair)
    cfg = kit.config(compute_dtype=torch.bfloat16)
    other = replace(cfg, **changes)
    other = replace(other, loss=replace(other.loss, compile=other.compile))
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/r", rank=0, world_size=1
        )
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    losses = []
    for one in (cfg, other):
        model = hf.load_model(str(pair / "student"), "m", torch.float32)
        learner = FsdpLearner(model, [head], one, torch.device("cuda"), 0, 1)
        losses.append([learner.train(i, samples).loss for i in range(3)])
        learner.sleep()
        learner.wake()
        losses[-1].append(learner.train(3, samples).loss)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


def test_weight_slots_are_page_locked(capfd: pytest.CaptureFixture[str]) -> None:
    channel = WeightChannel.create([("w", (1 << 20,), torch.float32)])
    channel.page_lock()
    assert capfd.readouterr().err == ""
    channel.write(3, iter([("w", torch.arange(1 << 20, device="cuda", dtype=torch.float32))]))
    ((_, found),) = channel.read(3)
    assert found.is_pinned()
    torch.testing.assert_close(found.cuda(), torch.arange(1 << 20, device="cuda", dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_version_is_published_beside_the_next_step_and_its_update_waits_on_the_device(
    pair: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The publication's stream sleeps for about two seconds before its last read. The step, which takes
    milliseconds, has its gradients long before that; its weights change only afterwards.
    """
    samples, cuda = kit.make_samples(pair), torch.device("cuda")
    if dtype == torch.bfloat16 and not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/r", rank=0, world_size=1
        )
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    learner = FsdpLearner(model, [head], kit.config(compute_dtype=dtype), cuda, 0, 1)
    channel = WeightChannel.create([(n, tuple(t.shape), torch.bfloat16) for n, t in learner.publish()])
    channel.page_lock()
    posted: list[Any] = []
    publisher = Publisher(WorkerSpec("learner", 0, 1, (0,), 1), channel, posted.append)
    for step in (0, 1):  # all kernels are loaded and all memory is allocated
        learner.train(step, samples)
    before = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in learner.publish()}
    pieces = learner.pieces()
    assert pieces is not None
    last = pieces[-1]

    def slowly() -> torch.Tensor:
        torch.cuda._sleep(4_000_000_000)
        return last.read()

    said_by_then: list[int] = []

    def before_update() -> None:
        torch.cuda.current_stream().synchronize()  # the gradients are there
        said_by_then.append(len(posted))
        publisher.let_update()

    learner.pieces = lambda: [*pieces[:-1], replace(last, read=slowly)]  # type: ignore[method-assign]
    publisher.publish(learner)
    learner.train(2, samples, before_update)
    after = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in learner.publish()}
    publisher.finish()
    assert said_by_then == [0]
    (published,) = posted
    assert (published.version, published.nbytes) == (2, sum(t.nbytes for t in before.values()))
    found = dict(channel.read(2))
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_time_sliced_run_on_one_gpu(fopd: Fopd, compute: str) -> None:
    recipe: dict[str, Any] = small_recipe(
        TINY,
        task={"horizon": 3, "eval_prompts": 64},
        sampler={"engine": "transformers", "max_new_tokens": 32, "concurrency": 64, "dtype": compute},
        learner={"steps": 40, "batch_samples": 64, "lr": 2e-3, "dtype": compute},
        schedule={"max_lag": 1},
        placement={"mode": "timeslice"},
        checkpoint={"every": 20},
    )
    recipe["teacher"]["dtype"] = compute
    run = fopd.run(recipe)
    s = summary(run)
    assert s["score_last"] > s["score_first"] + 0.2
    assert s["kl_last"] < 0.5 * s["kl_first"]
    check_accounts(run)
    fopd("resume", run, "--step", "20")
    check_accounts(run)


@pytest.mark.skipif(vllm_engine.problem() is not None, reason=str(vllm_engine.problem()))
def test_a_time_sliced_run_on_one_gpu_with_vllm(fopd: Fopd) -> None:
    """vLLM sleeps and wakes on the same device as the learner and a vLLM teacher."""
    vllm = {"engine": "vllm", "vllm": {"gpu_memory": 0.3}}
    recipe: dict[str, Any] = small_recipe(
        TINY,
        task={"horizon": 3, "eval_prompts": 64},
        sampler={"max_new_tokens": 32, "concurrency": 64, **vllm},
        learner={"steps": 40, "batch_samples": 64, "lr": 2e-3},
        schedule={"max_lag": 1},
        placement={"mode": "timeslice"},
    )
    recipe["teacher"] |= vllm
    run = fopd.run(recipe)
    assert summary(run)["score_last"] > summary(run)["score_first"] + 0.2
    check_accounts(run)
