"""Packed rows against each sequence alone, on architectures that attend in different ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from fopd_cli.engines.models import hf
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.masks import MaskPattern
from fopd_cli.engines.tokens.packing import check_packing
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing
from fopd_cli.errors import UserError

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 6.0, 9.0],
        "original_max_position_embeddings": 16,
    },
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4),
    "grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "sliding window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "window in some layers": Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "learned positions": GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.1,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "window in the mask alone": Qwen2MoeConfig(
        **SIZES,
        **EXPERTS,
        num_key_value_heads=2,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        initializer_range=0.2,
    ),
    "chunks": Llama4TextConfig(
        **SIZES,
        **EXPERTS,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=6,
        initializer_range=0.2,
        pad_token_id=0,
    ),
    "soft caps": Gemma2Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=1.0,
        final_logit_softcapping=None,
        sliding_window=5,
        query_pre_attn_scalar=8,
        initializer_range=0.2,
    ),
    "sinks": GptOssConfig(
        **SIZES,
        **EXPERTS,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=2,
    ),
    "longrope": Phi3Config(**SIZES, **LONGROPE, num_key_value_heads=2),
}


def model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    attention = hf.own_attention(hf.model_class(config), config)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    rope.by_sequence(lm)
    return lm


def hidden(lm: Any, sequences: list[np.ndarray], packed: bool) -> list[torch.Tensor]:
    batch = TokenBatch.of(sequences, packed, CPU, shared=not rope.by_length(lm.config))
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
        torch.stack(
            [h.pow(3).mean() for h in found]
        ).sum().backward()  # (the last norm keeps squares constant)
        gradients.append([p.grad.clone() for p in lm.parameters() if p.grad is not None])
        if packed:
            for one, other, ours in zip(alone, padded, found, strict=True):
                torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_a_row_holds_no_padding() -> None:
    batch = TokenBatch.of([np.arange(3), np.arange(5)], True, CPU)
    assert batch.ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.extra["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert [places.tolist() for places in batch.places] == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert TokenBatch.of([np.arange(3), np.arange(5)], False, CPU).ids.shape == (2, 5)


def test_an_architecture_with_a_running_state_is_refused() -> None:
    """LFM2's short convolutions would carry over from one sample into the next."""
    layers = ["conv", "full_attention"]
    lm = model(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=layers, initializer_range=0.2))
    enable_packing(lm)
    with pytest.raises(
        UserError, match=r"learner\.packing: Lfm2ForCausalLM .* a sample changes with its neighbours"
    ):
        probe(lm)


def test_rounding_is_no_reason_to_refuse() -> None:
    """Thirty layers in bfloat16 and float32, wide enough that rows of different lengths use other kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=30,
            num_attention_heads=3,
            num_key_value_heads=1,
        )
        lm = model(config).to(dtype)
        enable_packing(lm)
        probe(lm)


def test_a_neighbour_whose_length_becomes_a_samples_own_is_found() -> None:
    """transformers' longrope would use the row's longest position for every sample, unless prevented."""
    config = Phi3Config(**SIZES, **LONGROPE, num_key_value_heads=2)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    enable_packing(lm)
    probe(lm, longest=16)  # no sample is longer than the switch
    with pytest.raises(UserError, match="a sample is not what it is alone"):
        probe(lm, longest=64)


@pytest.mark.parametrize(("longest", "window"), [(5, 0), (6, 5), (64, 5)])
def test_a_window_is_known_for_kernels_that_take_no_mask(longest: int, window: int) -> None:
    rule = {
        "mask_function": sliding_window_causal_mask_function(5),
        "local_size": 5,
        "allow_is_causal_skip": True,
    }
    assert MaskPattern(sdpa_mask, rule).window(longest) == window


def test_other_rules_are_never_taken_for_a_window() -> None:
    chunk = chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.int64))
    rule = {"mask_function": chunk, "local_size": 5, "allow_is_causal_skip": True}
    assert MaskPattern(sdpa_mask, rule).window(5) == 0  # one chunk holds all
    assert MaskPattern(sdpa_mask, rule).window(6) is None
    own = {"mask_function": causal_mask_function, "allow_is_causal_skip": False}
    assert MaskPattern(sdpa_mask, own).window(5) is None
    assert MaskPattern(sdpa_mask, {"mask_function": causal_mask_function}).window(64) == 0


def test_the_queries_of_a_pattern_are_the_last_of_its_keys() -> None:
    rule = {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    mask = MaskPattern(sdpa_mask, rule).of(2, 5)
    assert mask is not None
    assert mask[0, 0].tolist() == [[False, True, True, True, False], [False, False, True, True, True]]
