"""Tiny random models of every architecture that fopd claims something about.

Windows, chunks and rope switches are so small that test samples pass them. Weights are drawn anew, wide
enough that a lost bias, norm or window shows. Nothing here imports fopd: what it says of these models is
compared with the table in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

VOCAB, WINDOW, CHUNK, SWITCH = 64, 6, 8, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 4,
}
DELTA: dict[str, Any] = {  # gated delta networks
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
}
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": SWITCH,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 4.0, 6.0, 9.0],
        "original_max_position_embeddings": SWITCH,
        "partial_rotary_factor": 1.0,
    },
}
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": SWITCH,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA3N: dict[str, Any] = {
    **BOTH,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "altup_active_idx": 0,
    "activation_sparsity_pattern": [0.0] * 4,
}
GRIFFIN: dict[str, Any] = {
    "lru_width": 32,
    "attention_window_size": WINDOW,
    "block_types": ["recurrent", "attention"],
    "conv1d_width": 3,
}
HYBRID = ["linear_attention", "full_attention"]
LEFT_OUT: Any = object()  # a size that this configuration does not take
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "depth": 1,
    "embed_dim": 16,
    "num_heads": 2,
}


def _config(kind: str, *parts: Mapping[str, Any], **changes: Any) -> Any:
    from transformers import AutoConfig

    merged: dict[str, Any] = dict(SIZES)
    for part in (*parts, changes):
        merged |= part
    merged = {name: value for name, value in merged.items() if value is not LEFT_OUT}
    return AutoConfig.for_model(kind, **merged)


def _vlm(kind: str, text: dict[str, Any], vision: dict[str, Any], **changes: Any) -> Any:
    from transformers import AutoConfig

    own = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return AutoConfig.for_model(
        kind, text_config={**SIZES, **text}, vision_config={**VISION, **vision}, **own, **changes
    )


of = partial(partial, _config)
vlm = partial(partial, _vlm)
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    # ---- dense decoders
    "llama": of("llama"),
    "llama tied": of("llama", tie_word_embeddings=True),
    "llama yarn": of(
        "llama",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": SWITCH,
        },
    ),
    "llama3 rope": of(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": SWITCH,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "llama dynamic": of("llama", DYNAMIC),
    "mistral": of("mistral", sliding_window=WINDOW),
    "ministral": of("ministral", BOTH),
    "ministral3": of("ministral3", sliding_window=None),
    "qwen2": of("qwen2"),
    "qwen2 window": of("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": of("qwen3"),
    "gemma": of("gemma"),
    "gemma2": of(
        "gemma2", BOTH, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=1.0
    ),
    "gemma3_text": of("gemma3_text", BOTH, query_pre_attn_scalar=8, final_logit_softcapping=1.0),
    "gemma3n_text": of("gemma3n_text", GEMMA3N, final_logit_softcapping=1.0),
    "gemma4_text": of(
        "gemma4_text",
        BOTH,
        EXPERTS,
        final_logit_softcapping=1.0,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        global_head_dim=8,
        num_global_key_value_heads=2,
    ),
    "vaultgemma": of("vaultgemma", BOTH, query_pre_attn_scalar=8, final_logit_softcapping=1.0),
    "phi": of("phi", partial_rotary_factor=0.5),
    "phi3": of("phi3", sliding_window=WINDOW),
    "phi3 longrope": of("phi3", LONGROPE),
    "stablelm": of("stablelm"),
    "starcoder2": of("starcoder2", sliding_window=WINDOW),
    "olmo": of("olmo"),
    "olmo2": of("olmo2"),
    "olmo3": of("olmo3", BOTH),
    "cohere": of("cohere", logit_scale=0.25),
    "cohere2": of("cohere2", BOTH, logit_scale=0.25),
    "granite": of(
        "granite",
        logits_scaling=8.0,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
        residual_multiplier=0.5,
    ),
    "granite_swa": of("granite_swa", BOTH, logits_scaling=4.0),
    "glm": of("glm", partial_rotary_factor=0.5),
    "glm4": of("glm4", partial_rotary_factor=0.5),
    "exaone4": of("exaone4", BOTH),
    "ernie4_5": of("ernie4_5"),
    "seed_oss": of("seed_oss"),
    "smollm3": of("smollm3", use_sliding_window=False, no_rope_layer_interval=2),
    "hunyuan_v1_dense": of("hunyuan_v1_dense"),
    "apertus": of("apertus"),
    "arcee": of("arcee"),
    "cwm": of("cwm", BOTH),
    "jais2": of("jais2"),
    "hyperclovax": of("hyperclovax", logits_scaling=0.5),
    "helium": of("helium"),
    "nemotron": of("nemotron"),
    "persimmon": of("persimmon"),
    "nanochat": of("nanochat", final_logit_softcapping=1.0),
    "minicpm3": of("minicpm3", LATENT, head_dim=16, dim_model_base=8),
    "modernbert-decoder": of(
        "modernbert-decoder", local_attention=WINDOW, layer_types=["full_attention", "sliding_attention"]
    ),
    "diffllama": of("diffllama"),
    "doge": of("doge"),
    "hrm_text": of("hrm_text"),
    "opt": of("opt", ffn_dim=48, word_embed_proj_dim=32),
    "opt projected": of("opt", ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": of("gpt2", n_positions=96),
    "gpt_bigcode": of("gpt_bigcode", n_positions=96),
    "gpt_neox": of("gpt_neox"),
    "gpt_neo": of("gpt_neo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    "gptj": of("gptj", rotary_dim=4),
    "codegen": of("codegen", rotary_dim=4),
    "bloom": of("bloom"),
    "mpt": of("mpt", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=96),
    "falcon": of("falcon", num_kv_heads=4, head_dim=LEFT_OUT, alibi=False),
    "falcon alibi": of("falcon", num_kv_heads=4, head_dim=LEFT_OUT, alibi=True),
    "xglm": of("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "biogpt": of("biogpt"),
    # ---- mixtures of experts
    "mixtral": of("mixtral", EXPERTS, sliding_window=WINDOW),
    "qwen2_moe": of(
        "qwen2_moe", EXPERTS, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3_moe": of("qwen3_moe", EXPERTS),
    "olmoe": of("olmoe", EXPERTS),
    "flex_olmo": of("flex_olmo", EXPERTS),
    "phimoe": of("phimoe", EXPERTS, sliding_window=WINDOW),
    "deepseek_v2": of("deepseek_v2", EXPERTS, LATENT, head_dim=8),
    "deepseek_v3": of("deepseek_v3", EXPERTS, LATENT, head_dim=8),
    "deepseek_v32": of(
        "deepseek_v32", EXPERTS, LATENT, head_dim=8, index_n_heads=16, index_head_dim=16, index_topk=4
    ),
    "glm4_moe": of("glm4_moe", EXPERTS),
    "glm4_moe_lite": of("glm4_moe_lite", EXPERTS, LATENT, head_dim=8),
    "glm_moe_dsa": of(
        "glm_moe_dsa", EXPERTS, LATENT, head_dim=8, index_n_heads=16, index_head_dim=16, index_topk=4
    ),
    "dots1": of("dots1", EXPERTS, BOTH),
    "ernie4_5_moe": of("ernie4_5_moe", EXPERTS, moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "exaone_moe": of("exaone_moe", EXPERTS, BOTH),
    "granitemoe": of("granitemoe", EXPERTS, logits_scaling=4.0),
    "granitemoeshared": of("granitemoeshared", EXPERTS, shared_intermediate_size=16, logits_scaling=4.0),
    "hunyuan_v1_moe": of("hunyuan_v1_moe", EXPERTS, moe_topk=2),
    "minimax_m2": of("minimax_m2", EXPERTS),
    "gpt_oss": of("gpt_oss", EXPERTS, BOTH, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "mimo_v2_flash": of("mimo_v2_flash", EXPERTS, BOTH),
    "llama4_text": of(
        "llama4_text",
        EXPERTS,
        attention_chunk_size=CHUNK,
        intermediate_size_mlp=48,
        floor_scale=4,
        moe_layers=[1],
    ),
    "longcat_flash": of(
        "longcat_flash",
        EXPERTS,
        LATENT,
        head_dim=8,
        num_layers=1,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        moe_topk=2,
        zero_expert_num=1,
    ),
    "dbrx": of(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=96,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "jetmoe": of("jetmoe", EXPERTS, kv_channels=8, num_key_value_heads=2, num_attention_heads=4),
    "afmoe": of("afmoe", EXPERTS, BOTH, num_dense_layers=1),
    "hy_v3": of("hy_v3", EXPERTS),
    "laguna": of("laguna", EXPERTS),
    "mellum": of("mellum", EXPERTS),
    "solar_open": of("solar_open", EXPERTS),
    "youtu": of("youtu", LATENT, head_dim=8),
    # ---- with a state from token to token
    "qwen3_next": of("qwen3_next", EXPERTS, DELTA, layer_types=HYBRID),
    "qwen3_5_text": of("qwen3_5_text", DELTA, layer_types=HYBRID),
    "qwen3_5_moe_text": of("qwen3_5_moe_text", EXPERTS, DELTA, layer_types=HYBRID),
    "olmo_hybrid": of("olmo_hybrid", DELTA, layer_types=HYBRID),
    "lfm2": of(
        "lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
    ),
    "lfm2_moe": of(
        "lfm2_moe", EXPERTS, layer_types=["conv", "full_attention"], conv_L_cache=3, num_dense_layers=1
    ),
    "bamba": of("bamba", MAMBA, attn_layer_indices=[1]),
    "jamba": of(
        "jamba",
        EXPERTS,
        MAMBA,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "granitemoehybrid": of(
        "granitemoehybrid",
        EXPERTS,
        MAMBA,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=16,
        logits_scaling=4.0,
    ),
    "falcon_h1": of("falcon_h1", MAMBA, lm_head_multiplier=0.5, embedding_multiplier=2.0),
    "zamba2": of(
        "zamba2",
        MAMBA,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        num_mem_blocks=1,
        n_mamba_heads=4,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=4,
        num_key_value_heads=4,
    ),
    "nemotron_h": of(
        "nemotron_h",
        MAMBA,
        EXPERTS,
        num_hidden_layers=4,
        hybrid_override_pattern="M*-M",
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        conv_kernel=3,
        num_nextn_predict_layers=0,
    ),
    "recurrent_gemma": of("recurrent_gemma", GRIFFIN, logits_soft_cap=1.0),
    "minimax": of("minimax", EXPERTS, layer_types=HYBRID[::-1], block_size=4),
    "mamba": of("mamba", state_size=8, time_step_rank=4, conv_kernel=3),
    "mamba2": of(
        "mamba2", num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1, chunk_size=8, conv_kernel=3
    ),
    "falcon_mamba": of("falcon_mamba", state_size=8, time_step_rank=4, conv_kernel=3),
    "rwkv": of("rwkv", attention_hidden_size=32, context_length=96),
    "kimi_linear": of(
        "kimi_linear",
        EXPERTS,
        LATENT,
        head_dim=8,
        layer_types=HYBRID,
        linear_head_dim=8,
        linear_num_heads=4,
        linear_conv_kernel_dim=3,
    ),
    "deepseek_v4": of(
        "deepseek_v4",
        EXPERTS,
        LATENT,
        sliding_window=WINDOW,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        index_n_heads=16,
        index_head_dim=8,
        index_topk=4,
    ),
    "hy_v4": of("hy_v4", EXPERTS, LATENT, index_n_heads=16, index_head_dim=16, index_topk=4),
    "inkling_text": of(
        "inkling_text",
        EXPERTS,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        d_rel=4,
        sliding_window_size=WINDOW,
        rel_extent=64,
        conv_kernel_size=3,
        logits_mup_width_multiplier=2.0,
    ),
    # ---- vision-language models, distilled as text
    "gemma3": vlm(
        "gemma3",
        {**BOTH, "model_type": "gemma3_text", "query_pre_attn_scalar": 8},
        {},
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    "llama4": vlm(
        "llama4",
        {**EXPERTS, "attention_chunk_size": CHUNK, "intermediate_size_mlp": 48, "floor_scale": 4},
        {},
    ),
    "qwen3_5": vlm("qwen3_5", {**DELTA, "layer_types": HYBRID}, {"out_hidden_size": 32}),
    "qwen2_vl": vlm(
        "qwen2_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        {"hidden_size": 32},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
    "qwen2_5_vl": vlm(
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
        {"out_hidden_size": 32},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
    ),
    "qwen3_vl": vlm(
        "qwen3_vl",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        image_token_id=60,
        video_token_id=61,
    ),
    "mistral3": vlm(
        "mistral3",
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", "head_dim": 8},
        image_token_index=60,
    ),
    "llava": vlm("llava", {"model_type": "llama"}, {"model_type": "clip_vision_model"}, image_token_index=60),
    "internvl": vlm(
        "internvl", {"model_type": "qwen2"}, {"image_size": [16, 16], "patch_size": [8, 8]}, image_token_id=60
    ),
    "smolvlm": vlm("smolvlm", {"model_type": "llama"}, {}, image_token_id=60),
    "paligemma": vlm(
        "paligemma", {"model_type": "gemma"}, {"model_type": "siglip_vision_model"}, image_token_index=60
    ),
    # ---- no decoders
    "t5": of("t5", d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4),
    "bart": of(
        "bart",
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    ),
}


def make(config: Any, architecture: Any, seed: int = 0) -> nn.Module:
    """The model with weights drawn anew, in evaluation mode: nothing is 0 or 1 only because training has not
    begun.
    """
    torch.manual_seed(seed)
    model: nn.Module = architecture.from_config(config, dtype=torch.float32).eval()
    wide = 0.15 if config.get_text_config().tie_word_embeddings else 0.5  # a tied embedding makes logits, too
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=wide if "embed" in name else 0.6 / parameter.shape[-1] ** 0.5)
            elif "A_log" not in name and "dt_bias" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
