"""Packed rows against each sequence alone, on architectures that attend in different ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from fopd_cli.engines.packing import check_packing
from fopd_cli.engines.token_batch import TokenBatch, enable_packing
from fopd_cli.errors import UserError

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4),
    "grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "sliding window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "window in some layers": Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "learned positions": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2
    ),
}


def model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def hidden(lm: Any, sequences: list[np.ndarray], packed: bool) -> list[torch.Tensor]:
    batch = TokenBatch.of(sequences, packed, CPU)
    flat = batch.hidden(lm)
    return [flat[places] for places in batch.places]


def probe(lm: Any, longest: int = 64) -> None:
    check_packing(lambda batch: batch.hidden(lm), lm, 64, longest, CPU, "learner.packing")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_is_each_alone(name: str) -> None:
    lm = model(ARCHITECTURES[name])
    rng = np.random.Generator(np.random.PCG64(0))
    sequences = [rng.integers(0, 64, size=n).astype(np.int32) for n in (7, 1, 19, 3, 12)]
    system, prompt = (rng.integers(0, 64, size=n).astype(np.int32) for n in (18, 17))
    sequences += [np.concatenate([system, own]) for own in sequences[:2]]
    sequences += [np.concatenate([system, prompt, own]) for own in (*sequences[:2], sequences[0][:0])]
    alone = [hidden(lm, [s], packed=False)[0] for s in sequences]
    padded = hidden(lm, sequences, packed=False)
    gradients = []
    for packed in (False, True):
        if packed:
            enable_packing(lm)
            probe(lm)
        lm.zero_grad()
        found = hidden(lm, sequences, packed)
        torch.stack([h.square().mean() for h in found]).sum().backward()
        gradients.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
        if packed:
            for one, other, ours in zip(alone, padded, found, strict=True):
                torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_a_row_holds_no_padding() -> None:
    batch = TokenBatch.of([np.arange(3), np.arange(5)], True, CPU)
    assert batch.ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.extra["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert [places.tolist() for places in batch.places] == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert TokenBatch.of([np.arange(3), np.arange(5)], False, CPU).ids.shape == (2, 5)


def test_an_architecture_with_a_running_state_is_refused() -> None:
    """LFM2's short convolutions would run on from one sample into the next."""
    layers = ["conv", "full_attention"]
    lm = model(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=layers, initializer_range=0.2))
    enable_packing(lm)
    with pytest.raises(UserError, match=r"learner\.packing: Lfm2ForCausalLM .* a sample changes with its neighbours"):
        probe(lm)


def test_rounding_is_no_reason_to_refuse() -> None:
    """Thirty layers in bfloat16 and in float32, wide enough that rows of another length run other kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        config = LlamaConfig(
            vocab_size=512, hidden_size=192, intermediate_size=384, num_hidden_layers=30, num_attention_heads=3,
            num_key_value_heads=1,
        )  # fmt: skip
        lm = model(config).to(dtype)
        enable_packing(lm)
        probe(lm)


def test_a_window_that_packing_would_lose_is_found_where_samples_reach_it() -> None:
    """Qwen2-MoE leaves its window to the mask, which a packed row does not have."""
    config = Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        use_sliding_window=True, sliding_window=24, max_window_layers=2, initializer_range=0.2,
    )  # fmt: skip
    lm = model(config)
    enable_packing(lm)
    probe(lm, longest=24)  # no sample is longer than the window
    with pytest.raises(UserError, match="a sample is not what it is alone"):
        probe(lm, longest=64)
