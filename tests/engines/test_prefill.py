"""The transformers sampler: how much it computes at once, and which requests join a running batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig

from fopd_cli.engines.models import hf
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.runtime.journal import records
from fopd_cli.samples import Request, Rollout, SamplingParams

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from uniform: a wrong context is a wrong log-prob
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "full attention": lambda: LlamaConfig(**SIZES),
    "a window": lambda: MistralConfig(**SIZES, sliding_window=7),
    "rope by length": lambda: Phi3Config(
        **SIZES, original_max_position_embeddings=24, max_position_embeddings=96, rope_parameters=LONGROPE
    ),
}
BUDGET = 40


def model_of(name: str, seed: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="sdpa").eval()
    rope.by_sequence(model)
    return model


def sampler_of(model: Any, batch: int, **changes: Any) -> tuple[TransformersSampler, list[int]]:
    """A sampler, and the tokens of each of its forward passes, padding included."""
    engine = TransformersSampler(model, hf.TokenRules(frozenset(), 0), CPU, batch, **changes)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, a, k: passes.append(k["input_ids"].numel()), with_kwargs=True)
    return engine, passes


def requests(lengths: list[int], new: list[int], first: int = 0) -> list[Request]:
    rng = np.random.Generator(np.random.PCG64(first))
    return [
        Request(
            first + i, rng.integers(1, 64, size=n).astype(np.int32), 7 + i, SamplingParams(max_new_tokens=m)
        )
        for i, (n, m) in enumerate(zip(lengths, new, strict=True))
    ]


def expected(model: Any, rollout: Rollout) -> np.ndarray:
    """log pi of every response token, each as the last token of its own prefix."""
    found = []
    for end in range(rollout.prompt_length, len(rollout.token_ids)):
        with torch.no_grad():
            logits = model(torch.from_numpy(rollout.token_ids[:end]).long()[None]).logits[0, -1]
        found.append(float(torch.log_softmax(logits.double(), -1)[int(rollout.token_ids[end])]))
    return np.array(found)


def others(name: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model_of(name, 1).state_dict().items()}


@pytest.mark.parametrize("name", ["full attention", "a window"])
def test_no_forward_pass_is_over_more_tokens_than_allowed(name: str) -> None:
    """Neither at the start nor after an update, when all rows are recomputed."""
    model, old, new = model_of(name), model_of(name), model_of(name, 1)
    engine, passes = sampler_of(model, 4, prefill_tokens=BUDGET)
    engine.submit(requests([30, 3, 17, 1], [12] * 4))
    early = [r for _ in range(5) for r in engine.step()]
    engine.load(1, iter(others(name).items()))
    while engine.busy:
        early += engine.step()
    assert BUDGET // 2 < max(passes) <= BUDGET
    assert sum(passes) > 4 * 30 + 4 * 35
    assert len(early) == 4
    for rollout in early:
        assert rollout.spans == [(0, 0, 5), (1, 5, 12)]
        np.testing.assert_allclose(rollout.logprobs[:5], expected(old, rollout)[:5], atol=2e-5)
        np.testing.assert_allclose(rollout.logprobs[5:], expected(new, rollout)[5:], atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_requests_join_a_batch_that_runs(name: str) -> None:
    """At once if the cache is plain keys and values; otherwise when it is rebuilt, or when the batch is done.
    Prompts are shorter and longer than the running rows, and one token long.
    """
    model, reference = model_of(name), model_of(name)
    engine, _ = sampler_of(model, 3, prefill_tokens=BUDGET)
    engine.submit(requests([5, 9, 4], [25, 3, 6]))
    engine.submit(requests([33, 1, 8], [4, 9, 5], first=10))
    seen: dict[int, int] = {}
    rollouts, step = [], 0
    while engine.busy:
        step += 1
        for rollout in engine.step():
            seen[rollout.key] = step
            rollouts.append(rollout)
    assert len(rollouts) == 6
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.logprobs, expected(reference, rollout), atol=2e-5)
    assert (seen[1], seen[2], seen[0]) == (3, 6, 25)
    if name == "full attention":
        assert [seen[key] for key in (10, 11, 12)] == [3 + 4, 6 + 9, 7 + 5]
    else:
        assert min(seen[10], seen[11], seen[12]) > 25


def test_rows_that_join_make_room_for_their_prompts_alone() -> None:
    """A batch is as wide as its longest current row, not its longest ever."""
    engine, _ = sampler_of(model_of("full attention"), 2)
    engine.submit(requests([30, 2], [2, 40]))
    engine.submit(requests([3] * 12, [3] * 12, first=10))
    widths = []
    while engine.busy:
        engine.step()
        widths.append(engine._ids.shape[1])
    assert max(widths[4:-1]) <= 2 + 40
    assert widths[6] < 15


def test_stale_keys_and_values_are_kept_if_so_told() -> None:
    """Nothing is recomputed; tokens after the update come from the new weights over the old keys and values,
    and are counted.
    """
    model, old, new = (model_of("full attention", seed) for seed in (0, 0, 1))
    engine, passes = sampler_of(model, 2, stale_kv=True)
    engine.submit(requests([20, 20], [9, 9]))
    for _ in range(4):
        engine.step()
    engine.load(1, iter(others("full attention").items()))
    before, rollouts = len(passes), []
    while engine.busy:
        rollouts += engine.step()
    assert passes[before:] == [2] * 5
    for rollout in rollouts:
        assert (rollout.spans, rollout.stale_kv) == ([(0, 0, 4), (1, 4, 9)], 5)
        ids = torch.from_numpy(rollout.token_ids).long()[None]
        with torch.no_grad():
            cache = old(ids[:, :23], use_cache=True).past_key_values
            logits = new(ids[:, 23:], past_key_values=cache).logits[0, :-1].double()
        found = torch.log_softmax(logits, -1)[range(5), ids[0, 24:]]
        np.testing.assert_allclose(rollout.logprobs[4:], found, atol=2e-5)
        assert abs(rollout.logprobs[4:] - expected(new, rollout)[4:]).max() > 1e-2


def test_the_share_of_tokens_over_stale_keys_is_a_metric() -> None:
    model = model_of("full attention")
    for stale, figures in ((False, {}), (True, {"stale_kv": 5 / 9})):
        engine, _ = sampler_of(model, 2, stale_kv=stale)
        engine.submit(requests([4, 4], [9, 9]))
        for _ in range(4):
            engine.step()
        engine.load(1, iter(others("full attention").items()))
        rollouts = []
        while engine.busy:
            rollouts += engine.step()
        assert records.stale_kv(rollouts) == figures
