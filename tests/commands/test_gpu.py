"""What only a CUDA device can show; skipped elsewhere. `scripts/gpu` runs it together with the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
import transport_kit
from conftest import TINY, Fopd, check_accounts, lines, small_recipe, summary

from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.engines.learner.prefetch import Lane
from fopd_cli.engines.models import hf
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.runtime.crew.fleet import Fleet, WorkerSpec
from fopd_cli.runtime.crew.messages import Lost
from fopd_cli.runtime.crew.publisher import Publisher
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.ipc import Ipc
from fopd_cli.runtime.weights.transport import Shared, Transport
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
    if dtype == torch.bfloat16:
        kit.own_group(tmp_path)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    learner = FsdpLearner(model, [head], cfg, torch.device("cuda"), 0, 1)
    assert learner.optimizer.param_groups[0]["fused"]
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


SAVINGS: list[dict[str, Any]] = [{"compile": True}, {"offload": True}, {"optimizer_dtype": "bf16"}]


def saving(cfg: LearnerConfig, changes: dict[str, Any]) -> LearnerConfig:
    """The configuration as a recipe with these keys of its learner makes it."""
    other = kit.changed(cfg, **changes)
    return replace(other, loss=replace(other.loss, compile=other.learner.compile))


@pytest.mark.parametrize("changes", SAVINGS, ids=str)
def test_what_saves_time_or_memory_changes_no_loss(
    pair: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    samples = kit.make_samples(pair)
    cfg = kit.config(compute_dtype=torch.bfloat16)
    other = saving(cfg, changes)
    kit.own_group(tmp_path)
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


def test_a_micro_batch_is_read_once_it_is_there_and_stays_while_it_is_read() -> None:
    """First the copies are late, by a second of sleep on their stream, then the computation is. The third
    batch's copy would find the memory of the second free.
    """
    lane, size, nap = Lane(torch.device("cuda")), 1 << 22, 2_000_000_000

    def sent(value: int) -> tuple[dict[str, torch.Tensor], Any]:
        return lane.send({"ids": torch.full((size,), value)})

    torch.cuda._sleep(1)
    assert (3 * lane.receive(*sent(5))["ids"] == 15).all()  # all kernels are loaded, one block is allocated
    with torch.cuda.stream(lane._stream):
        torch.cuda._sleep(nap)
    batch = lane.receive(*sent(7))
    assert (3 * batch["ids"] == 21).all()
    torch.cuda._sleep(nap)
    found = 3 * batch["ids"]
    del batch
    following = sent(9)
    assert (found == 21).all()
    assert (3 * lane.receive(*following)["ids"] == 27).all()


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
    if dtype == torch.bfloat16:
        kit.own_group(tmp_path)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    learner = FsdpLearner(model, [head], kit.config(compute_dtype=dtype), cuda, 0, 1)
    channel = WeightChannel.create([(n, tuple(t.shape), torch.bfloat16) for n, t in learner.publish()])
    posted: list[Any] = []
    outlet = Shared(channel).outlet(WorkerSpec("learner", 0, 1, (0,), 1))
    publisher = Publisher(outlet, True, posted.append)
    for step in (0, 1):  # all kernels are loaded and all memory is allocated
        learner.train(step, samples)
    before = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in learner.publish()}

    def sleeps() -> None:
        torch.cuda._sleep(4_000_000_000)

    said_by_then: list[int] = []

    def before_update() -> None:
        torch.cuda.current_stream().synchronize()  # the gradients are there
        said_by_then.append(len(posted))
        publisher.let_update()

    publisher.publish(kit.Held(learner, sleeps))
    learner.train(2, samples, before_update)
    after = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in learner.publish()}
    publisher.finish()
    assert said_by_then == [0]
    (published,) = posted
    assert (published.version, published.nbytes) == (2, sum(t.nbytes for t in before.values()))
    found = dict(channel.read(2))
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in after.items())


def test_weights_by_handle_are_those_through_the_host(pair: Path, tmp_path: Path) -> None:
    """Learner and sampler processes on one device, with the environment of a run's (the learner's memory is
    in expandable segments). A process in the sampler's place opens the same memory.
    """
    layout = transport_kit.layout(pair, torch.bfloat16)
    transports: dict[str, Transport] = {
        "shared": Shared(WeightChannel.create(layout)),
        "ipc": Ipc.create(layout, [0], tmp_path / ".rendezvous-i", mirrored=True),
    }
    learner, sampler = WorkerSpec("learner", 0, 1, (0,), 1), WorkerSpec("sampler", 0, 1, (0,), 1)
    with Fleet(tmp_path, 120, 300) as fleet:
        fleet.start(learner, transport_kit.learner, transports, pair, tmp_path / "ranks")
        fleet.start(sampler, transport_kit.sampler, transports, pair, replaceable=True)
        transport_kit.answers(fleet, ["learner-0", "sampler-0"], 300)
        digests = []
        for version in range(4):
            held = []
            for by in transports:
                ((published, _),) = transport_kit.ask(
                    fleet, ["learner-0"], transport_kit.Publish(by)
                ).values()
                found = transport_kit.ask(fleet, ["sampler-0"], transport_kit.LoadBy(by, version))
                held.append(found["sampler-0"])
                print(
                    f"version {version} by {by}: published in {published:.4f} s, "
                    f"loaded in {held[-1].seconds:.4f} s"
                )
            assert held[0].digest == held[1].digest
            for one, other in zip(held[0].logprobs, held[1].logprobs, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
            digests.append(held[0].digest)
            transport_kit.ask(fleet, ["learner-0"], transport_kit.Learn(version))
        assert len(set(digests)) == 4
        lost = transport_kit.ask(fleet, ["sampler-0"], transport_kit.LoadBy("ipc", 3, dies=5))
        assert isinstance(lost["sampler-0"], Lost)
        fleet.start(replace(sampler, restarts=1), transport_kit.sampler, transports, pair, replaceable=True)
        transport_kit.answers(fleet, ["sampler-0"], 300)
        again = transport_kit.ask(fleet, ["sampler-0"], transport_kit.LoadBy("ipc", 3))
        assert again["sampler-0"].digest == digests[3]


@pytest.mark.parametrize(
    "engine",
    [
        "transformers",
        pytest.param(
            "vllm",
            marks=pytest.mark.skipif(vllm_engine.problem() is not None, reason=str(vllm_engine.problem())),
        ),
    ],
)
def test_a_colocated_run_by_handles(fopd: Fopd, engine: str) -> None:
    """The sampler has the learner's weights: at max_lag 0 nothing drifts but by rounding."""
    recipe: dict[str, Any] = small_recipe(
        TINY,
        task={"horizon": 3, "eval_prompts": 16},
        sampler={"engine": engine, "max_new_tokens": 32, "concurrency": 64, "dtype": "fp32"},
        learner={"steps": 6, "batch_samples": 64, "lr": 2e-3, "dtype": "fp32"},
        schedule={"max_lag": 0},
        placement={"mode": "colocate", "transport": "ipc"},
        eval={"every": 2, "keep_best": "kl"},
    )
    recipe["teacher"]["dtype"] = "fp32"
    run = fopd.run(recipe)
    steps = [r for r in lines(run / "metrics.jsonl") if r["kind"] == "step"]
    assert len(steps) == 6
    assert max(r["drift_roll"] for r in steps) < 1e-3
    check_accounts(run)


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
