"""Everything that is asked of Hugging Face models and tokenizers, in one place."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fopd_cli.engines import rope
from fopd_cli.engines.templates import encode_observation, encode_prompt
from fopd_cli.engines.vocabularies import special_ids
from fopd_cli.errors import UserError
from fopd_cli.tasks.calls import MARKS

__all__ = ["encode_observation", "encode_prompt"]  # of the same kind: what is asked of tokenizers

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def _transformers() -> Any:
    import transformers  # seconds of import time, so only where a model or a tokenizer is really loaded

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_config(model: str, key: str) -> Any:
    """The model's configuration; `key` names the recipe key in the error."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(f"{key}: {model!r} holds no config.json; give a Hugging Face model directory or a hub id")
    try:
        return _transformers().AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: cannot load a model configuration from {model!r}: {_first_line(error)}") from None


def load_tokenizer(model: str, key: str) -> Any:
    """The model's tokenizer."""
    try:
        return _transformers().AutoTokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{key}: cannot load a tokenizer from {model!r}: {_first_line(error)}") from None


def load_model(model: str, key: str, dtype: torch.dtype) -> nn.Module:
    """The causal language model on the CPU, in `dtype`, in evaluation mode; of a vision-language model all of it."""
    config = load_config(model, key)
    attention = own_attention(model_class(config), config)
    try:
        loaded = _auto(config).from_pretrained(model, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise UserError(f"{key}: cannot load model weights from {model!r}: {_first_line(error)}") from None
    check_head(loaded, key)
    check_causal(loaded, key)
    rope.by_sequence(loaded)
    return loaded.eval()


def empty_model(config: Any) -> nn.Module:
    """The architecture on the meta device: shapes without memory."""
    config = copy.deepcopy(config)  # a model writes its attention into it, and this one may be a living model's
    with torch.device("meta"):
        return _auto(config).from_config(config, attn_implementation=own_attention(model_class(config), config))


def model_class(config: Any) -> Any:
    """transformers' class for it; of a vision-language model one that holds its language model. None: it has none."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def _auto(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found = _transformers()
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or model_class(config) is None
    return found.AutoModelForCausalLM if known else found.AutoModelForImageTextToText


def own_attention(architecture: Any, config: Any) -> str:
    """transformers' attention for it when it is not packed: PyTorch's, or the architecture's own, "eager", where PyTorch's is
    not offered or would leave out a soft cap without a word."""
    offered = architecture is None or architecture._supports_sdpa
    return "sdpa" if offered and getattr(text_config(config), "attn_logit_softcapping", None) is None else "eager"


def backbone(model: Any) -> Any:
    """The part that gives post-norm hidden states."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if found is model or found is model.get_output_embeddings():  # Llama 4, ModernBERT
        return model.base_model if model.base_model is not model else model.model
    return found


def freeze_unused(model: Any) -> None:
    """Parameters that no text goes through, a vision tower's for example, do not learn."""
    head = model.get_output_embeddings()
    used = {id(p) for part in (backbone(model), head, model.get_input_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def blocks(model: Any) -> Any:
    """The transformer blocks: the units of sharding and of activation checkpointing."""
    for name in ("layers", "h", "blocks"):
        found = getattr(backbone(model), name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise UserError(f"{type(model).__name__}: fopd does not know where this architecture keeps its transformer blocks")


def between_blocks(model: Any, call: Callable[[], None]) -> None:
    """Have `call` called before each transformer block, forward and backward."""
    for block in blocks(model):
        block.register_forward_pre_hook(lambda *_: call())
        block.register_full_backward_pre_hook(lambda *_: call())


@torch.no_grad()
def check_head(model: Any, key: str) -> None:
    """Logits must be `hidden @ head.T`: a bias, a scale or a soft cap after the head would be lost by our losses."""
    ids = torch.tensor([[0, 1, 2]])
    hidden = backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    ours = hidden @ model.get_output_embeddings().weight.T
    theirs = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2 * float(theirs.abs().max()) + 1e-6):
        raise UserError(
            f"{key}: this architecture ({type(model).__name__}) changes its logits after the output head, "
            "which fopd does not support yet"
        )


@torch.no_grad()
def check_causal(model: Any, key: str) -> None:
    """What a token predicts must not depend on later ones: a masked language model or a bidirectional prefix has no policy."""
    first, second = model(input_ids=torch.tensor([[0, 1, 2], [0, 1, 3]]), use_cache=False).logits[:, 0]
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise UserError(f"{key}: {type(model).__name__} looks ahead, and only causal language models can be distilled")


def load_head(model: str, key: str, dtype: torch.dtype) -> Tensor:
    """Only the unembedding `(V, hidden)` of a model, read from its safetensors without loading the rest."""
    folder = _local_folder(model, key)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    tied = getattr(text_config(load_config(model, key)), "tie_word_embeddings", False)
    for name in ("lm_head.weight", "model.embed_tokens.weight")[: 1 + tied]:  # untied, the head may have another name
        path = folder / (files.get(name, "") if files else "model.safetensors")
        if path.is_file():
            with safe_open(str(path), "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    return tensors.get_tensor(name).to(dtype)
    return load_model(model, key, dtype).get_output_embeddings().weight.detach().clone()  # type: ignore[operator]


def _local_folder(model: str, key: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise UserError(f"{key}: cannot download {model!r}: {_first_line(error)}") from None


@dataclass(frozen=True)
class TokenRules:
    """The ids that end a response, and the id that fills padding."""

    eos: frozenset[int]
    pad: int


def token_rules(model: str, tokenizer: Any, config: Any, key: str) -> TokenRules:
    """EOS from the generation config (which may list several), else the model's, else the tokenizer's."""
    generation = {}
    if (Path(model) / "generation_config.json").is_file():
        generation = json.loads((Path(model) / "generation_config.json").read_text())
    elif not Path(model).is_dir():
        try:
            generation = _transformers().GenerationConfig.from_pretrained(model).to_dict()
        except OSError:
            generation = {}
    for ids in (generation.get("eos_token_id"), getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        if ids is not None:
            eos = frozenset([ids] if isinstance(ids, int) else ids)
            break
    else:
        raise UserError(
            f"{key}: {model!r} names no end-of-sequence token; add eos_token_id to its generation_config.json"
        )
    pad = tokenizer.pad_token_id
    return TokenRules(eos, min(eos) if pad is None else pad)


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    """Text without special tokens."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def decode_turn(tokenizer: Any, ids: np.ndarray) -> str:
    """Text of a turn for its environment: without special tokens, but for those that say where thoughts and calls are."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    left_out = special_ids(tokenizer) - {i for i, token in added.items() if token.content in MARKS}
    return str(tokenizer.decode([i for i in ids.tolist() if i not in left_out], skip_special_tokens=False))


def weight_layout(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every distinct parameter and persistent buffer, in the order in which weights are published.

    Tied weights stand once, under their first name: the sampler's model ties them again by itself.
    """
    model = empty_model(config)
    seen: set[int] = set()
    layout = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            layout.append((name, tuple(tensor.shape)))
    return layout


def text_config(config: Any) -> Any:
    """The language model's part of a multi-modal configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocab_size(config: Any) -> int:
    """Rows of the unembedding, padding included."""
    return int(text_config(config).vocab_size)


def hidden_width(config: Any) -> int:
    """Of post-norm hidden states, which is not always the configuration's `hidden_size` (opt-350m)."""
    empty: Any = empty_model(config)
    return int(empty.get_output_embeddings().weight.shape[1])


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0  # no attention, no keys: a state-space model
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def tied_names(config: Any) -> dict[str, str]:
    """Other name -> the name under which it is published, of every tied weight."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in empty_model(config).state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
