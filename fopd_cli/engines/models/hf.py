"""Everything that is asked of Hugging Face models and tokenizers, in one place."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fopd_cli.engines.models.checkpoint_files import CheckpointFiles, LoadReport, unconvertible
from fopd_cli.engines.models.heads import HeadRule, UnknownHead, find_rule
from fopd_cli.engines.models.library import library
from fopd_cli.engines.text.templates import encode_observation, encode_prompt
from fopd_cli.engines.text.vocabularies import special_ids
from fopd_cli.engines.tokens import rope
from fopd_cli.errors import UserError
from fopd_cli.losses.head import Head
from fopd_cli.tasks.calls import MARKS

__all__ = ["encode_observation", "encode_prompt"]  # also asked of tokenizers

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def load_config(model: str, key: str) -> Any:
    """The model's configuration; `key` names the recipe key in the error."""
    if (Path(model) / "adapter_config.json").is_file():  # transformers would load another model instead
        raise UserError(f"{key}: {model!r} is a LoRA adapter; merge it into its base model and give that")
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise UserError(
            f"{key}: {model!r} holds no config.json; give a Hugging Face model directory or a hub id"
        )
    try:
        # A checkpoint's own code is never run; unless told so, transformers would stop to ask at the
        # terminal.
        return library().AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a broken configuration raises many kinds of errors
        raise UserError(
            f"{key}: cannot load a model configuration from {model!r}: {_first_line(error)}"
        ) from None


def load_tokenizer(model: str, key: str) -> Any:
    """The model's tokenizer."""
    try:
        return library().AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{key}: cannot load a tokenizer from {model!r}: {_first_line(error)}") from None


def load_model(model: str, key: str, dtype: torch.dtype) -> nn.Module:
    """The causal language model on the CPU, in `dtype` (except what its architecture keeps in fp32), in
    evaluation mode; a vision-language model as a whole.

    Raises `UserError` if its files are incomplete.
    """
    config = load_config(model, key)
    attention = own_attention(model_class(config), config)
    try:
        loaded, info = _auto(config).from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        if names := unconvertible(error):
            LoadReport(missing=[f"parts of {name}" for name in names]).refuse(f"{key}: {model!r}")
        raise UserError(f"{key}: cannot load model weights from {model!r}: {_first_line(error)}") from None
    untied = {
        other: first for other, first in _ties(loaded).items() if other not in loaded.all_tied_weights_keys
    }
    LoadReport.of(info, untied).refuse(f"{key}: {model!r}")
    check_causal(loaded, key)
    rope.by_sequence(loaded)
    return loaded.eval()


def load_report(model: str, config: Any, key: str) -> LoadReport | None:
    """How the model's files fit its configuration, without reading the weights; None if the files are not
    here yet.
    """
    folder = Path(model) if Path(model).is_dir() else _cached_folder(model)
    try:
        files = None if folder is None else CheckpointFiles.of(folder)
        if files is None:
            if Path(model).is_dir():
                raise ValueError(
                    "there is neither a model.safetensors nor a pytorch_model.bin, nor an index of either"
                )
            return None
        kind: Any = type(empty_model(config))
        empty, info = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=files.empty(),
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if names := unconvertible(error):
            return LoadReport(missing=[f"parts of {name}" for name in names])
        raise UserError(f"{key}: cannot read the weights of {model!r}: {_first_line(error)}") from None
    return LoadReport.of(info, {o: f for o, f in _ties(empty).items() if files.differ((o, f))})


def _ties(model: Any) -> dict[str, str]:
    """Other name -> first name of the weights that the configuration ties."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def _cached_folder(model: str) -> Path | None:
    """Where a hub model is if it was downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors"], local_files_only=True)
        )
    except Exception:
        return None


def empty_model(config: Any, dtype: torch.dtype | None = None, buffers: bool = False) -> nn.Module:
    """The architecture on the meta device: shapes without memory. The dtype is the configuration's by
    default. `buffers`: make these real, with the values that the architecture computes for them.
    """
    # a model writes its attention and dtype into it, and this may be a live model's
    config = copy.deepcopy(config)
    own = {
        "attn_implementation": own_attention(model_class(config), config),
        **({} if dtype is None else {"dtype": dtype}),
    }
    if not buffers:
        with torch.device("meta"):
            return _auto(config).from_config(config, **own)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _auto(config).from_config(config, **own)
    model.tie_weights()
    return model


def model_class(config: Any) -> Any:
    """transformers' class for it; for a vision-language model, one that holds its language model. None if
    there is none.
    """
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

    found = library()
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or model_class(config) is None
    return found.AutoModelForCausalLM if known else found.AutoModelForImageTextToText


def own_attention(architecture: Any, config: Any) -> str:
    """transformers' attention for it when it is not packed: PyTorch's, or the architecture's own, "eager", if
    PyTorch's is not offered or would silently leave out a soft cap.
    """
    offered = architecture is None or architecture._supports_sdpa
    return (
        "sdpa"
        if offered and getattr(text_config(config), "attn_logit_softcapping", None) is None
        else "eager"
    )


def asks_which_attention(model: Any) -> bool:
    """Whether its code computes something else under attention names that it does not know, so that it must
    not be given one of ours. (Sparse attention then skips its choice of keys.)
    """
    return any(_compares(name) for name in {type(module).__module__ for module in model.modules()})


@functools.cache
def _compares(module: str) -> bool:
    path = getattr(sys.modules[module], "__file__", None)
    pattern = r"""_attn_implementation (==|!=|in|not in) [^\n]*["']sdpa["']"""
    return path is not None and re.search(pattern, Path(path).read_text()) is not None


def backbone(model: Any) -> Any:
    """The part that outputs post-norm hidden states."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if found is model or found is model.get_output_embeddings():  # Llama 4, ModernBERT
        return model.base_model if model.base_model is not model else model.model
    return found


def freeze_unused(model: Any) -> None:
    """Freeze parameters that no text goes through, such as a vision tower's."""
    head = model.get_output_embeddings()
    used = {
        id(p) for part in (backbone(model), head, model.get_input_embeddings()) for p in part.parameters()
    }
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def blocks(model: Any) -> Any:
    """The transformer blocks: the units of sharding and of activation checkpointing."""
    for name in ("layers", "h", "blocks"):
        found = getattr(backbone(model), name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise UserError(
        f"{type(model).__name__}: fopd does not know where this architecture keeps its transformer blocks"
    )


def between_blocks(model: Any, call: Callable[[], None]) -> None:
    """Call `call` before each transformer block, forward and backward."""
    for block in blocks(model):
        block.register_forward_pre_hook(lambda *_: call())
        block.register_full_backward_pre_hook(lambda *_: call())


@torch.no_grad()
def check_causal(model: Any, key: str) -> None:
    """What a token predicts must not depend on later ones: a masked language model or a bidirectional prefix
    defines no policy.
    """
    first, second = model(input_ids=torch.tensor([[0, 1, 2], [0, 1, 3]]), use_cache=False).logits[:, 0]
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise UserError(
            f"{key}: {type(model).__name__} looks ahead, and only causal language models can be distilled"
        )


def head_rule(config: Any, key: str) -> HeadRule:
    """What the architecture does to its logits. Raises `UserError`, prefixed with `key`, if fopd does not
    know it.
    """
    model = empty_model(config, torch.float32)
    try:
        return find_rule(model, backbone(model))
    except UnknownHead as error:
        raise UserError(f"{key}: {type(model).__name__} {error}") from None


def load_head(model: str, key: str, dtype: torch.dtype) -> Head:
    """A model's head `(V, hidden)`, read from its files without loading the rest if they store it under its
    own name.
    """
    config = load_config(model, key)
    rule, empty = head_rule(config, key), empty_model(config)
    output: Any = empty.get_output_embeddings()  # type: ignore[operator]
    # a tied weight has two
    names: dict[int, list[str]] = {id(tensor): [] for tensor in (output.weight, output.bias)}
    for name, tensor in empty.state_dict(keep_vars=True).items():
        names.get(id(tensor), []).append(name)
    weight, bias = names[id(output.weight)], names[id(output.bias)]
    files = _files_of(model, key, [*weight, *bias])
    found = [name for name in weight if files is not None and name in files.where]
    if files is None or not found or not all(name in files.where for name in bias):
        lm: Any = load_model(model, key, dtype)
        head = rule.head(lm)
        return replace(
            head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach()
        )
    if files.differ(found):
        LoadReport(untied=[" and ".join(found)]).refuse(f"{key}: {model!r}")
    read = Head(files.tensor(found[0]), files.tensor(bias[0]) if bias else None, rule.scale, rule.cap).to(
        dtype
    )
    if read.weight.shape != output.weight.shape:
        wrong = f"{found[0]} {list(read.weight.shape)} instead of {list(output.weight.shape)}"
        LoadReport(mismatched=[wrong]).refuse(f"{key}: {model!r}")
    return read


def _files_of(model: str, key: str, names: Sequence[str]) -> CheckpointFiles | None:
    """A model's files; for a hub model that is not here yet, only those that hold these tensors."""
    if Path(model).is_dir() or _cached_folder(model) is not None:
        return CheckpointFiles.of(local_folder(model, key))
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            index = Path(hf_hub_download(model, "model.safetensors.index.json"))
        except EntryNotFoundError:
            return CheckpointFiles.of(local_folder(model, key))
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        wanted = {name: shards[name] for name in names if name in shards}
        here = {shard: Path(hf_hub_download(model, shard)) for shard in sorted(set(wanted.values()))}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}: cannot download the head of {model!r}: {_first_line(error)}") from None
    return CheckpointFiles({name: here[shard] for name, shard in wanted.items()})


def model_file(model: str, name: str) -> Path | None:
    """One file of a model directory or of a downloaded hub model; None if it has no such file."""
    folder = Path(model) if Path(model).is_dir() else _cached_folder(model)
    path = None if folder is None else folder / name
    return path if path is not None and path.is_file() else None


def local_folder(model: str, key: str) -> Path:
    """Where a model's files are; those of a hub model are downloaded."""
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
            generation = library().GenerationConfig.from_pretrained(model).to_dict()
        except OSError:
            generation = {}
    for ids in (
        generation.get("eos_token_id"),
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
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
    """Text of a turn for its environment: without special tokens, except those that mark thoughts and
    calls.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    left_out = special_ids(tokenizer) - {i for i, token in added.items() if token.content in MARKS}
    return str(tokenizer.decode([i for i in ids.tolist() if i not in left_out], skip_special_tokens=False))


def weight_layout(config: Any, dtype: torch.dtype) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every distinct parameter and persistent buffer of a model loaded in `dtype`, in
    the order in which weights are published.

    Tied weights appear once, under their first name: the sampler's model ties them again by itself.
    """
    model = empty_model(config, dtype)
    kept = _kept(model, dtype)
    seen: set[int] = set()
    layout = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            layout.append((name, tuple(tensor.shape), kept(name) or tensor.dtype))
    return layout


def cast(model: Any, dtype: torch.dtype) -> None:
    """Cast in place to the dtypes of a model loaded in `dtype`: what its architecture keeps in fp32 is in
    fp32.
    """
    dtypes = {name: own for name, _, own in weight_layout(model.config, dtype)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes:  # a tied weight has one name there, and is one tensor here
            tensor.data = tensor.data.to(dtypes[name])


def modules_in_fp32(model: Any, dtype: torch.dtype) -> list[nn.Module]:
    """The outermost modules whose parameters the architecture all keeps in fp32 when loaded in `dtype`."""
    kept = _kept(model, dtype)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(outer + ".") for outer in found)
        names = [f"{name}.{own}" for own, _ in module.named_parameters()]
        if names and not inner and all(kept(own) == torch.float32 for own in names):
            found[name] = module
    return list(found.values())


def _kept(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """Gives the dtype that transformers' loader uses for a tensor of this name whatever it is asked for; None
    if it has no such rule.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)  # from `_keep_in_fp32_modules` and the like, of all submodels
    if not plan:
        return lambda _: None
    pattern, groups, _ = build_glob_alternation(list(plan))

    def own(name: str) -> torch.dtype | None:
        found = pattern.search(name)
        return None if found is None else plan[groups[found.lastgroup]]

    return own


def text_config(config: Any) -> Any:
    """The language model's part of a multi-modal configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocab_size(config: Any) -> int:
    """Ids that have a logit: rows of the unembedding, with its padding unless the model cuts it off."""
    text = text_config(config)
    return int(getattr(text, "unpadded_vocab_size", None) or text.vocab_size)


def hidden_width(config: Any) -> int:
    """Width of post-norm hidden states, which is not always the config's `hidden_size` (opt-350m)."""
    empty: Any = empty_model(config)
    return int(empty.get_output_embeddings().weight.shape[1])


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0  # no attention, no keys: a state-space model
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def tied_names(config: Any) -> dict[str, str]:
    """Other name -> published name of every tied weight."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in empty_model(config).state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
