"""What a model's memory and time depend on, read from its configuration: no weights are loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from fopd_cli.engines.models import hf
from fopd_cli.engines.models.support import reads_in_pieces


@dataclass(frozen=True)
class Shapes:
    """Counts of numbers, unless it says otherwise. Tied parameters count once."""

    parameters: int
    active: int  # parameters that one token goes through: in a mixture, only the chosen experts'
    layers: int
    block: int  # parameters of the largest transformer block
    root: int  # parameters outside the blocks: embedding, head, final norm
    head: int  # of the unembedding, which may be the embedding
    width: int  # of hidden states
    queries: int  # of a token in one layer
    keys: int  # keys and values of a token in one layer; 0: no attention
    inner: int  # values between the two halves of a token's MLPs in one layer
    normed_queries: bool  # queries and keys have norms of their own
    vocab: int
    in_pieces: bool  # a sequence can be read some columns at a time

    @property
    def kv(self) -> int:
        """Keys and values of a token in all layers."""
        return self.layers * self.keys


def shapes(config: Any) -> Shapes:
    """The shapes of a configuration's model."""
    model: Any = hf.empty_model(config, torch.float32)
    text = hf.text_config(config)
    blocks = hf.blocks(model)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    parameters = sum(p.numel() for p in model.parameters())
    heads = getattr(text, "num_attention_heads", None) or 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = int(getattr(text, "hidden_size", 0) or model.get_output_embeddings().weight.shape[1])
    head_dim = getattr(text, "head_dim", None) or (width // heads if heads else 0)
    names = {name.rpartition(".")[2] for name, _ in blocks[0].named_modules()}
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    inner = int(getattr(text, "intermediate_size", None) or 4 * width)
    idle = 0
    if experts and chosen:
        inner = chosen * int(getattr(text, "moe_intermediate_size", None) or inner)
        fused = sum(p.numel() for name, p in blocks.named_parameters() if ".experts." in name)
        idle = math.floor(fused * (1 - chosen / experts))
    return Shapes(
        parameters=parameters,
        active=parameters - idle,
        layers=len(sizes),
        block=max(sizes),
        root=parameters - sum(sizes),
        head=int(model.get_output_embeddings().weight.numel()),
        width=width,
        queries=heads * head_dim,
        keys=2 * kv_heads * head_dim,
        inner=inner,
        normed_queries="q_norm" in names,
        vocab=hf.vocab_size(config),
        in_pieces=reads_in_pieces(model),
    )
