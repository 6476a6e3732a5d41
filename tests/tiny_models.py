"""Tiny random models of many architectures: biases and norms away from 0 and 1, logits large enough that caps
and scales matter.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

VOCAB = 260
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 6.0, "attn_logit_softcapping": None},
    "nanochat": {"final_logit_softcapping": 7.0},
    "recurrent_gemma": {"logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3},
    "granite": {"logits_scaling": 1.7},
    "granitemoe": {"logits_scaling": 0.6, "num_local_experts": 2, "num_experts_per_tok": 1},
    "cohere": {"logit_scale": 0.3, "num_key_value_heads": 2},
    "phi": {"num_key_value_heads": 2},  # a bias
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "rotary_dim": 8},  # a bias
    "falcon_h1": {
        "lm_head_multiplier": 0.6,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "glm4_moe": {
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "use_bias": True},
}


def tiny_model(architecture: str, seed: int = 0, logits: float = 8.0, **changes: Any) -> Any:
    """In float32; the products of its head have a standard deviation of about `logits`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**COMMON, **OWN[architecture], **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("bias"):
                    tensor.normal_()
                elif "norm" in name:
                    tensor.mul_(1 + 0.3 * torch.randn_like(tensor)).add_(0.1 * torch.randn_like(tensor))
            head = model.get_output_embeddings()
            ids = torch.arange(2, 200)[None]
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            head.weight.mul_(logits / (hidden @ head.weight.T).std())
            if head.bias is not None:
                head.bias.mul_(logits / 4)
    return model


def save(model: Any, folder: Path, tokenizer: Path) -> Path:
    """As a model directory, with the tokenizer of another one."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, folder / path.name)
    return folder
