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
)

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
    return [flat[start : start + len(s)] for start, s in zip(batch.starts, sequences, strict=True)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_is_each_alone(name: str) -> None:
    lm = model(ARCHITECTURES[name])
    rng = np.random.Generator(np.random.PCG64(0))
    sequences = [rng.integers(0, 64, size=n).astype(np.int32) for n in (7, 1, 19, 3, 12)]
    alone = [hidden(lm, [s], packed=False)[0] for s in sequences]
    padded = hidden(lm, sequences, packed=False)
    gradients = []
    for packed in (False, True):
        if packed:
            enable_packing(lm, "learner.packing")
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
    assert batch.starts.tolist() == [0, 3]
    assert TokenBatch.of([np.arange(3), np.arange(5)], False, CPU).ids.shape == (2, 5)


def test_an_architecture_with_a_running_state_is_refused() -> None:
    """LFM2's short convolutions would run on from one sample into the next."""
    lm = model(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]))
    with pytest.raises(UserError, match=r"learner\.packing: Lfm2ForCausalLM gives other hidden states"):
        enable_packing(lm, "learner.packing")
    hidden(lm, [np.arange(3)], packed=False)  # as usable as before
