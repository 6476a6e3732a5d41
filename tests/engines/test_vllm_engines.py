"""The real vLLM on the CPU: log-probs, seeds, continuous batching and live weights, against plain
transformers models.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_models
import torch
import vllm_kit as kit
from conftest import SLOW, wait_for

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.broadcast import Broadcast
from fopd_cli.samples import Request, Rollout, SamplingParams, TargetSpec, TeacherTargets

PROBLEM = vllm_engine.problem()


@pytest.mark.parametrize(
    ("version", "expected"), [(None, "is not installed"), ("0.31.2", "tested with 0.32.0")]
)
def test_a_version_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str | None, expected: str
) -> None:
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: version)
    assert expected in str(vllm_engine.problem())


def new_host(folder: Path, ahead: bool = False) -> kit.Host:
    if PROBLEM is not None:
        pytest.skip(PROBLEM)
    server = kit.Host(folder / "vllm.log")
    if ahead:
        server(kit.schedule_ahead)
        server.late = 1
    return server


@pytest.fixture(scope="module", params=["in step", pytest.param("ahead", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Host]:
    """Engines that schedule a batch when the previous one is done, and engines that schedule one ahead."""
    server = new_host(tmp_path_factory.mktemp("vllm"), request.param == "ahead")
    yield server
    server.close()


@pytest.fixture(params=["pair", "llama_pair"])
def student(request: pytest.FixtureRequest) -> str:
    """One with tied embeddings, one without."""
    return str(request.getfixturevalue(request.param) / "student")


def requests(count: int, params: SamplingParams, longest: int = 9, seed: int = 0) -> list[Request]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [
        Request(
            i,
            rng.integers(4, 200, size=rng.integers(1, longest)).astype(np.int32),
            seed=100 + i,
            params=params,
        )
        for i in range(count)
    ]


def model_logprobs(model: Any, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """float64 (n, V): log pi of all tokens at every response position, from one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.from_numpy(rollout.token_ids).long()[None]).logits[0].double() / temperature
    return torch.log_softmax(logits, -1)[rollout.prompt_length - 1 : -1].numpy()


def of_sampled(logprobs: np.ndarray, rollout: Rollout) -> np.ndarray:
    return np.take_along_axis(logprobs, rollout.response_ids[:, None].astype(int), -1)[:, 0]


def renormalised(logprobs: np.ndarray, vocab: int) -> np.ndarray:
    """Over only the ids below `vocab`."""
    kept = logprobs[:, :vocab]
    return kept - np.logaddexp.reduce(kept, -1, keepdims=True)


def generate(student: str, wanted: list[Request]) -> dict[int, Rollout]:
    engine = kit.original(kit.sampler(student), student)
    engine.submit(wanted)
    return kit.drain(engine)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_the_models(host: kit.Host, student: str, temperature: float) -> None:
    rollouts = host(
        generate, student, requests(10, SamplingParams(temperature=temperature, max_new_tokens=12))
    )
    model = hf.load_model(student, "m", torch.float32)
    assert len(rollouts) == 10
    for rollout in rollouts.values():
        expected = of_sampled(model_logprobs(model, rollout, temperature), rollout)
        np.testing.assert_allclose(rollout.logprobs, expected, atol=2e-5)
        assert rollout.finish == ("stop" if rollout.response_ids[-1] == 1 else "length")
        assert (rollout.finish == "length") == (
            rollout.response_length == 12 and rollout.response_ids[-1] != 1
        )
        assert rollout.spans == [(0, 0, rollout.response_length)]


def test_top_p_is_renormalised_and_greedy_is_certain(host: kit.Host, student: str) -> None:
    params = [
        SamplingParams(top_p=0.5, max_new_tokens=12),
        SamplingParams(temperature=0.0, max_new_tokens=6, keep_topk=2),
    ]
    wanted = [Request(i, np.array([5, 6, 7], np.int32), i, params[i % 2]) for i in range(8)]
    model = hf.load_model(student, "m", torch.float32)
    for key, rollout in host(generate, student, wanted).items():
        full = model_logprobs(model, rollout)
        if key % 2:
            assert (rollout.response_ids == full.argmax(-1)).all()
            assert (rollout.logprobs == 0).all()
            continue
        for row, token, found in zip(full, rollout.response_ids, rollout.logprobs, strict=True):
            order = np.argsort(-row)
            mass = np.exp(row[order]).cumsum()
            nucleus = order[: int(np.searchsorted(mass, 0.5)) + 1]
            assert token in nucleus
            assert found == pytest.approx(row[token] - np.log(np.exp(row[nucleus]).sum()), abs=1e-4)


def test_topk_and_full_behaviour_distributions(host: kit.Host, student: str) -> None:
    model = hf.load_model(student, "m", torch.float32)
    for keep in (5, -1):
        for rollout in host(
            generate, student, requests(3, SamplingParams(max_new_tokens=6, keep_topk=keep))
        ).values():
            full = model_logprobs(model, rollout)
            assert rollout.topk_logprobs is not None
            if keep < 0:
                np.testing.assert_allclose(rollout.topk_logprobs, full, atol=2e-5)
                continue
            np.testing.assert_allclose(rollout.topk_logprobs, -np.sort(-full, -1)[:, :5], atol=2e-5)
            assert rollout.topk_ids is not None
            found = np.take_along_axis(full, rollout.topk_ids.astype(int), -1)
            np.testing.assert_allclose(rollout.topk_logprobs, found, atol=2e-5)


def test_sampling_follows_the_distribution(host: kit.Host, student: str) -> None:
    """First tokens for 3,000 seeds against the model's probabilities: chi-squared over the likely ones."""
    wanted = [
        Request(i, np.array([9, 8], np.int32), i, SamplingParams(max_new_tokens=1)) for i in range(3000)
    ]
    rollouts = host(generate, student, wanted)
    model = hf.load_model(student, "m", torch.float32)
    p = np.exp(model_logprobs(model, rollouts[0])[0])
    counts = np.bincount([int(r.response_ids[0]) for r in rollouts.values()], minlength=len(p))
    likely = p * 3000 > 5
    expected = np.append(p[likely], p[~likely].sum()) * 3000
    observed = np.append(counts[likely], counts[~likely].sum())
    chi2, degrees = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def adapted(student: str, seed: int) -> Any:
    """The student with nonzero adapters of rank 12 (not one of vLLM's sizes)."""
    model = hf.load_model(student, "m", torch.float32)
    lora.add_adapters(model, 12, 24.0, "all-linear", seed, torch.float32)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _with_adapters(student: str, wanted: list[Request]) -> dict[int, Rollout]:
    """Adapter 1 for the first rollouts, adapter 2 in the middle of the others."""
    engine = kit.adapter_sampler(student, 12)
    engine.load(1, lora.adapters(adapted(student, 1)))
    engine.submit(wanted)
    done = {}
    for _ in range(8):
        done |= {r.key: r for r in engine.step()}
    engine.load(2, lora.adapters(adapted(student, 2)))
    return done | kit.drain(engine)


def test_an_adapter_alone_is_the_merged_model(host: kit.Host, student: str) -> None:
    """Also after one replaced another mid-request, with prompts longer than a cache block."""
    wanted = requests(6, SamplingParams(max_new_tokens=20), longest=200)
    rollouts = host(_with_adapters, student, wanted)
    models = {}
    for version in (1, 2):
        models[version] = hf.load_model(student, "m", torch.float32)
        models[version].load_state_dict(dict(lora.merged(adapted(student, version))), strict=False)
    spans = 0
    for rollout in rollouts.values():
        for version, start, stop in rollout.spans:
            expected = of_sampled(model_logprobs(models[version], rollout), rollout)
            np.testing.assert_allclose(rollout.logprobs[start:stop], expected[start:stop], atol=5e-5)
            spans += 1
    assert spans > len(rollouts)
    one, other = (of_sampled(model_logprobs(m, rollouts[0]), rollouts[0]) for m in models.values())
    assert abs(one - other).max() > 0.1


def _together_and_alone(student: str, wanted: list[Request]) -> tuple[dict[int, Rollout], dict[int, Rollout]]:
    together = generate(student, wanted)
    alone = {}
    for request in reversed(wanted):
        alone |= generate(student, [request])
    return together, alone


def test_a_rollout_depends_on_seed_prompt_and_version_alone(host: kit.Host, student: str) -> None:
    together, alone = host(_together_and_alone, student, requests(8, SamplingParams(max_new_tokens=16)))
    for key, rollout in together.items():
        np.testing.assert_array_equal(rollout.token_ids, alone[key].token_ids)
        np.testing.assert_allclose(rollout.logprobs, alone[key].logprobs, atol=1e-5)


def _crowd(student: str) -> dict[int, Rollout]:
    engine = kit.original(kit.sampler(student), student)
    engine.submit(requests(64, SamplingParams(max_new_tokens=8), longest=200))
    early = [r for _ in range(3) for r in engine.step()]
    engine.load(1, kit.published(hf.load_model(student, "m", torch.float32).state_dict(), student))
    return {r.key: r for r in early} | kit.drain(engine)


def test_more_tokens_at_once_than_fit_a_forward_pass(host: kit.Host, pair: Path) -> None:
    """Prompts, and after an update all running requests, are computed in several passes."""
    student = str(pair / "student")
    rollouts, model = host(_crowd, student), hf.load_model(student, "m", torch.float32)
    assert len(rollouts) == 64
    assert sum(len(r.token_ids) for r in rollouts.values()) > 4096
    for rollout in rollouts.values():
        np.testing.assert_allclose(
            rollout.logprobs, of_sampled(model_logprobs(model, rollout), rollout), atol=2e-5
        )


def _finishing_order(student: str) -> list[tuple[int, int]]:
    engine = kit.original(kit.sampler(student), student)
    lengths = [40, 3, 7, 2]
    engine.submit(
        [
            Request(i, np.array([9], np.int32), i, SamplingParams(max_new_tokens=n))
            for i, n in enumerate(lengths)
        ]
    )
    seen, step = [], 0
    while engine.busy:
        step += 1
        seen += [(step, r.key) for r in engine.step()]
        if step == 4:
            engine.submit([Request(9, np.array([9], np.int32), 9, SamplingParams(max_new_tokens=2))])
    return seen


def _scheduled(student: str) -> list[int]:
    """Tokens of each batch that is in flight when the first token of five requests is seen."""
    engine = kit.original(kit.sampler(student), student)
    engine.submit(requests(5, LONG))
    while not any(row.ids for row in engine._rows.values()):
        engine.step()
    tokens = kit.in_flight(engine)
    engine.abort()
    return tokens


def test_the_next_batch_is_under_way_where_vllm_schedules_ahead(host: kit.Host, pair: Path) -> None:
    """A token of each request. Without it, no test here would show what CUDA's schedule does."""
    assert host(_scheduled, str(pair / "student")) == ([5] if host.late else [])


def test_no_batch_barrier(host: kit.Host, pair: Path) -> None:
    """Finished requests leave at once, new ones join at the next token."""
    left = dict((key, step) for step, key in host(_finishing_order, str(pair / "student")))
    left = {key: step - host.late for key, step in left.items()}
    assert left[3] <= 2
    assert left[1] <= 3
    assert left[9] <= 6 < left[2] + 1 <= left[0]


# ---- live weights ------------------------------------------------------------------------------------------


def perturbed(student: str, seed: int) -> dict[str, torch.Tensor]:
    """A completely different model of the same shape, still tied."""
    model = hf.load_model(student, "m", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {k: v.clone() for k, v in model.state_dict().items()}


def fresh(student: str, weights: dict[str, torch.Tensor]) -> Any:
    model = hf.load_model(student, "m", torch.float32)
    model.load_state_dict(weights)
    return model


def through_shared_memory(student: str, version: int, weights: dict[str, torch.Tensor]) -> Any:
    """Exactly as in a run: written into a slot by the learner, read from it by the sampler."""
    channel = WeightChannel.create(hf.weight_layout(hf.load_config(student, "m"), torch.float32))
    channel.write(version, iter(kit.published(weights, student)))
    return channel.read(version)


def _updates(student: str, count: int, longest: int, transport: str) -> list[tuple[int, list[Rollout]]]:
    carried = {"shared": through_shared_memory, "broadcast": by_broadcast}[transport]
    engine, out = kit.original(kit.sampler(student), student), []
    for version in range(1, count + 1):
        engine.load(version, carried(student, version, perturbed(student, version)))
        engine.submit(requests(4, SamplingParams(max_new_tokens=6), longest))
        out.append((version, list(kit.drain(engine).values())))
    return out


@pytest.mark.parametrize(
    ("count", "longest", "transport"),
    [(10, 9, "shared"), (2, 300, "shared"), (2, 9, "broadcast")],
    ids=["ten in a row", "prompts over a cache block", "by broadcast"],
)
def test_an_updated_engine_is_the_new_model(
    host: kit.Host, student: str, count: int, longest: int, transport: str
) -> None:
    for version, rollouts in host(_updates, student, count, longest, transport):
        model = fresh(student, perturbed(student, version))
        for rollout in rollouts:
            expected = of_sampled(model_logprobs(model, rollout), rollout)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
            assert rollout.spans == [(version, 0, rollout.response_length)]


def _update_in_the_middle(student: str, prompt: int) -> list[Rollout]:
    engine = kit.original(kit.sampler(student), student)
    engine.submit(
        [
            Request(
                i, np.arange(4, 4 + prompt, dtype=np.int32) % 200 + 4, i, SamplingParams(max_new_tokens=14)
            )
            for i in range(4)
        ]
    )
    early = [r for _ in range(5) for r in engine.step()]
    for version in (3, 4):
        engine.load(version, through_shared_memory(student, version, perturbed(student, version)))
        early += [r for _ in range(4) for r in engine.step()]
    return early + list(kit.drain(engine).values())


@pytest.mark.parametrize("prompt", [5, 290])
def test_an_update_in_the_middle_opens_a_span_and_is_whole(host: kit.Host, student: str, prompt: int) -> None:
    """Every token has the log-prob of the version that its span names, given everything before it."""
    models = {0: hf.load_model(student, "m", torch.float32)}
    models |= {v: fresh(student, perturbed(student, v)) for v in (3, 4)}
    rollouts = host(_update_in_the_middle, student, prompt)
    assert len(rollouts) == 4
    assert any(r.spans == [(0, 0, 5), (3, 5, 9), (4, 9, 14)] for r in rollouts)
    for rollout in rollouts:
        for version, start, end in rollout.spans:
            expected = of_sampled(model_logprobs(models[version], rollout), rollout)
            np.testing.assert_allclose(rollout.logprobs[start:end], expected[start:end], atol=1e-5)


def _over_stale_keys(student: str) -> tuple[list[Rollout], list[Rollout]]:
    """Rollouts that an update interrupted, and rollouts that began after it with the same prompts."""
    engine = kit.original(kit.sampler(student, stale_kv=True), student)
    wanted = requests(4, SamplingParams(max_new_tokens=14), longest=300)
    engine.submit(wanted)
    early = [r for _ in range(5) for r in engine.step()]
    engine.load(3, through_shared_memory(student, 3, perturbed(student, 3)))
    early += kit.drain(engine).values()
    engine.submit(wanted)
    return early, list(kit.drain(engine).values())


def test_stale_keys_and_values_are_kept_if_so_told_and_never_shared(host: kit.Host, pair: Path) -> None:
    """Tokens after the update come from the new weights over the old keys and values; later requests use none
    of those.
    """
    student = str(pair / "student")
    old, new = hf.load_model(student, "m", torch.float32), fresh(student, perturbed(student, 3))
    met, later = host(_over_stale_keys, student)
    assert len(met) == len(later) == 4
    for rollout in later:
        assert rollout.stale_kv == 0
        np.testing.assert_allclose(
            rollout.logprobs, of_sampled(model_logprobs(new, rollout), rollout), atol=2e-5
        )
    spanning = [r for r in met if len(r.spans) == 2]
    assert spanning
    for rollout in spanning:
        start = rollout.spans[1][1]
        assert rollout.stale_kv == rollout.response_length - start
        kept = rollout.prompt_length + start - 1  # the last token sampled before was not yet computed
        ids = torch.from_numpy(rollout.token_ids).long()[None]
        with torch.no_grad():
            cache = old(ids[:, :kept], use_cache=True).past_key_values
            logits = new(ids[:, kept:], past_key_values=cache).logits[0, :-1].double()
        logprobs = torch.log_softmax(logits, -1)
        found = logprobs.gather(-1, ids[0, kept + 1 :, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.logprobs[start:], found, atol=5e-5)
        exact = of_sampled(model_logprobs(new, rollout), rollout)[start:]
        assert abs(rollout.logprobs[start:] - exact).max() > 1e-2


def _partial(student: str) -> str:
    engine = kit.original(kit.sampler(student), student)
    some = kit.published(perturbed(student, 1), student)[:-2]
    try:
        engine.load(1, some)
    except RuntimeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("ahead", [False, pytest.param(True, marks=SLOW)], ids=["in step", "ahead"])
def test_a_partial_update_is_refused(tmp_path: Path, pair: Path, ahead: bool) -> None:
    """In a separate engine, which is useless afterwards."""
    host = new_host(tmp_path, ahead)
    try:
        assert "lacks weights" in host(_partial, str(pair / "student"))
    finally:
        host.close()


def _abort(student: str) -> tuple[bool, int]:
    engine = kit.original(kit.sampler(student), student)
    engine.submit(requests(5, SamplingParams(max_new_tokens=50)))
    engine.step()
    engine.abort()
    quiet = not engine.busy and engine.step() == []
    engine.submit(requests(5, SamplingParams(max_new_tokens=3)))
    return quiet, len(kit.drain(engine))


def test_abort_forgets_everything(host: kit.Host, pair: Path) -> None:
    assert host(_abort, str(pair / "student")) == (True, 5)


def _turns(student: str) -> tuple[list[list[Rollout]], list[list[int]], list[int]]:
    """An episode's turns under one key: ended, aborted, and ended by an update; what each left in flight, and
    what was in flight when one was aborted.
    """
    engine, turns, left, aborted = kit.original(kit.sampler(student), student), [], [], []

    def ask(turn: int) -> None:
        prompt = np.arange(4 + turn, 30 + turn, dtype=np.int32)
        engine.submit([Request(key, prompt + key, 10 * turn + key, LONG) for key in range(3)])

    for turn in range(4):
        ask(turn)
        turns.append(list(kit.drain(engine).values()))
        left.append(kit.in_flight(engine))
        if turn == 1:
            ask(7)
            engine.step()
            aborted += kit.in_flight(engine)
            engine.abort()
            left.append(kit.in_flight(engine))
        if turn == 2:
            kit.original(engine, student)
    return turns, left, aborted


LONG = SamplingParams(max_new_tokens=6)


def test_the_next_turn_under_the_same_key_begins_anew(tmp_path: Path, pair: Path) -> None:
    """Where vLLM schedules ahead, the batch in flight when a turn ends holds one more token of it."""
    student, host = str(pair / "student"), new_host(tmp_path, ahead=True)
    try:
        turns, left, aborted = host(_turns, student)
    finally:
        host.close()
    model = hf.load_model(student, "m", torch.float32)
    assert aborted == [3 * 26]  # the prompts
    assert left == [[]] * 5
    for rollouts in turns:
        assert len(rollouts) == 3
        for rollout in rollouts:
            assert rollout.response_length <= 6
            expected = of_sampled(model_logprobs(model, rollout), rollout)
            np.testing.assert_allclose(rollout.logprobs, expected, atol=2e-5)


# ---- tensor parallelism ------------------------------------------------------------------------------------


def by_broadcast(student: str, version: int, weights: dict[str, torch.Tensor]) -> Any:
    """As in a run with `placement.transport: broadcast`, in pieces that no layer fits into; the learner's end
    is in this process.
    """
    layout = hf.weight_layout(hf.load_config(student, "m"), torch.float32)
    meeting = Path(tempfile.mkdtemp()) / ".rendezvous"
    transport = Broadcast.create(layout, meeting, 60.0, mirrored=False, bucket=1 << 12)
    outlet = transport.outlet(WorkerSpec("learner", 0, 1, (), 1))
    outlet.write(version, iter(kit.published(weights, student)))
    return transport.inlet(WorkerSpec("sampler", 0, 1, (), 1), False).read(version)


def _split(model: str, transport: str) -> tuple[list[Rollout], list[Rollout], list[int]]:
    """Two processes, with an update mid-request; returns rollouts, and vLLM's own processes."""
    carried = {"shared": through_shared_memory, "broadcast": by_broadcast}[transport]
    import psutil

    from fopd_cli.engines.vllm.sampler import VllmSampler

    config, tokenizer = hf.load_config(model, "m"), hf.load_tokenizer(model, "m")
    rules = hf.token_rules(model, tokenizer, config, "m")
    engine = VllmSampler(kit.options(model, tensor_parallel=2), rules, hf.tied_names(config))
    engine.submit(requests(4, SamplingParams(max_new_tokens=10)))
    early = [r for _ in range(5) for r in engine.step()]
    engine.load(7, carried(model, 7, perturbed(model, 7)))
    children = [
        p.pid for p in psutil.Process().children(recursive=True) if "from_parent" not in " ".join(p.cmdline())
    ]
    for child in children:  # as systemd does: they go on with their work
        os.kill(child, signal.SIGTERM)
        os.kill(child, signal.SIGINT)
    return early + list(kit.drain(engine).values()), [], children


@SLOW
@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_split_engine_is_updated_in_all_its_processes_and_leaves_none(
    tmp_path: Path, pair: Path, transport: str
) -> None:
    model = str(pair / "teacher")  # it has enough heads
    host = new_host(tmp_path)
    try:
        rollouts, _, children = host(_split, model, transport)
    finally:
        host.close()  # SIGKILL
    models = {0: hf.load_model(model, "m", torch.float32), 7: fresh(model, perturbed(model, 7))}
    assert any(len(r.spans) == 2 for r in rollouts)
    for rollout in rollouts:
        for version, start, end in rollout.spans:
            expected = of_sampled(model_logprobs(models[version], rollout), rollout)
            np.testing.assert_allclose(rollout.logprobs[start:end], expected[start:end], atol=1e-5)
    assert len(children) >= 2
    wait_for(
        lambda: not any(psutil.pid_exists(p) for p in children),
        "vLLM's processes to die with their parent",
        5.0,
    )


# ---- ids that the pair does not share, and logits that change after the head -------------------------------


def _generated_by(
    options: dict[str, Any], model: str, updates: list[list[tuple[str, torch.Tensor]]]
) -> list[Rollout]:
    """By a separate engine, after it loaded these weights one after another."""
    from fopd_cli.engines.vllm.sampler import VllmSampler

    config, tokenizer = hf.load_config(model, "m"), hf.load_tokenizer(model, "m")
    rules = hf.token_rules(model, tokenizer, config, "m")
    engine = VllmSampler(kit.options(model, **options), rules, hf.tied_names(config))
    for version, weights in enumerate(updates):
        engine.load(version, weights)
    params = (
        SamplingParams(max_new_tokens=16, keep_topk=4),
        SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=16),
    )
    engine.submit([Request(i, np.array([5, 6, 7 + i], np.int32), i, params[i % 2]) for i in range(12)])
    return list(kit.drain(engine).values())


@pytest.mark.parametrize("updates", [0, 2])
def test_ids_past_the_shared_ones_are_never_sampled(tmp_path: Path, student: str, updates: int) -> None:
    """Log-probs are normalized over the remaining ids, even after live updates."""
    host, vocab = new_host(tmp_path), 130
    model = hf.load_model(student, "m", torch.float32)
    try:
        rollouts = host(
            _generated_by, {"vocab": vocab}, student, [kit.published(model.state_dict(), student)] * updates
        )
    finally:
        host.close()
    assert all(r.response_ids.max() < vocab for r in rollouts)
    assert any(model_logprobs(model, r).argmax(-1).max() >= vocab for r in rollouts)  # it would draw others
    for rollout in rollouts:
        if rollout.topk_ids is None:
            continue
        full = renormalised(model_logprobs(model, rollout), vocab)
        np.testing.assert_allclose(rollout.logprobs, of_sampled(full, rollout), atol=2e-5)
        np.testing.assert_allclose(rollout.topk_logprobs, -np.sort(-full, -1)[:, :4], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gemma2", "granite", "phi"])
def test_vllm_alters_logits_as_the_learner_does(tmp_path: Path, pair: Path, architecture: str) -> None:
    # Heads of 32: the narrowest that vLLM's CPU attention knows.
    model = tiny_models.tiny_model(architecture, hidden_size=64, head_dim=32)
    path = str(tiny_models.save(model, tmp_path / "m", pair / "student"))
    host = new_host(tmp_path)
    try:
        rollouts = host(_generated_by, {}, path, [kit.published(model.state_dict(), path)])
    finally:
        host.close()
    for rollout in rollouts:
        if rollout.topk_ids is not None:
            full = model_logprobs(model, rollout)
            np.testing.assert_allclose(rollout.logprobs, of_sampled(full, rollout), atol=1e-4)


# ---- teacher -----------------------------------------------------------------------------------------------


def _score(teacher: str, kind: Any, k: int, rollouts: list[Rollout], vocab: int) -> list[TeacherTargets]:
    from fopd_cli.engines.vllm.teacher import VllmTeacher

    engine = _TEACHERS.get(teacher)
    if engine is None:
        # Fewer batched tokens than a sample has: its log-probs then come in pieces.
        opts = kit.options(
            teacher,
            prefix_caching=False,
            live_weights=False,
            seeded=False,
            max_batched_tokens=64,
            vocab=vocab,
        )
        engine = _TEACHERS[teacher] = VllmTeacher(opts)
    spec = TargetSpec(kind, k, torch.float32)
    targets = [
        TeacherTargets(
            kind, **{n: torch.zeros(shape, dtype=d) for n, d, shape in spec.fields(r.response_length)}
        )
        for r in rollouts
    ]
    engine.score(rollouts, targets)
    return targets


_TEACHERS: dict[str, Any] = {}


def _hidden(teacher: str, rollouts: list[Rollout]) -> list[TeacherTargets]:
    from fopd_cli.engines.vllm.teacher import VllmTeacher

    opts = kit.options(
        teacher, prefix_caching=False, live_weights=False, seeded=False, max_batched_tokens=64, hidden=True
    )
    head = hf.load_head(teacher, "m", torch.float32)
    engine = VllmTeacher(opts, head)
    targets = [
        TeacherTargets("hidden", hidden=torch.zeros(r.response_length, head.weight.shape[1]))
        for r in rollouts
    ]
    for several in (slice(0, 5), slice(5, None)):
        engine.score(rollouts[several], targets[several])
    assert engine.head() is head
    assert engine.engine._core.model_executor.driver_worker.worker._kept == {}
    return targets


def test_hidden_states_are_the_models(host: kit.Host, student: str) -> None:
    """For prompts in one chunk and in several, post-norm, as the learner's teacher head expects them."""
    wanted = requests(9, SamplingParams(max_new_tokens=20), longest=90)
    rollouts = list(host(generate, student, wanted).values())
    path = str(Path(student).parent / "teacher")
    model = hf.load_model(path, "m", torch.float32)
    for rollout, target in zip(rollouts, host(_hidden, path, rollouts), strict=True):
        ids = torch.from_numpy(rollout.token_ids).long()[None]
        with torch.no_grad():
            states = hf.backbone(model)(ids).last_hidden_state[0, rollout.prompt_length - 1 : -1]
        torch.testing.assert_close(target.hidden, states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_teacher_targets_are_the_models(host: kit.Host, student: str, kind: str) -> None:
    rollouts = list(
        host(generate, student, requests(9, SamplingParams(max_new_tokens=20), longest=90)).values()
    )
    path = str(Path(student).parent / "teacher")
    model = hf.load_model(path, "m", torch.float32)
    vocab = 250  # the ids above are padding of the teacher's, say, and none of the student's
    rollouts = [r for r in rollouts if r.response_ids.max() < vocab]
    assert rollouts
    for rollout, target in zip(rollouts, host(_score, path, kind, 6, rollouts, vocab), strict=True):
        full = renormalised(model_logprobs(model, rollout), vocab)
        assert target.logprobs is not None
        np.testing.assert_allclose(target.logprobs.numpy(), of_sampled(full, rollout), atol=2e-5)
        if target.topk_logprobs is not None and target.topk_ids is not None:
            np.testing.assert_allclose(target.topk_logprobs.numpy(), -np.sort(-full, -1)[:, :6], atol=2e-5)
            found = np.take_along_axis(full, target.topk_ids.long().numpy(), -1)
            np.testing.assert_allclose(target.topk_logprobs.numpy(), found, atol=2e-5)


# ---- refusals ----------------------------------------------------------------------------------------------


def _refusal(model: str, changes: dict[str, Any]) -> str:
    from fopd_cli.errors import UserError

    try:
        vllm_engine.VllmEngine(kit.options(model, **changes))
    except UserError as error:
        return str(error)
    return "accepted"


def test_what_vllm_refuses_is_one_clear_line(host: kit.Host, pair: Path) -> None:
    message = host(_refusal, str(pair / "student"), {"cache_bytes": 1 << 18, "max_tokens": 1000})
    assert message.startswith("sampler.vllm: vLLM refuses: ")
    assert "KV cache is needed" in message
    assert "\n" not in message
