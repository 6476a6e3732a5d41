"""Which architectures fopd can distil, from only a configuration: before weights are loaded and workers
started.

docs/models.md is the table of what was tried; `tests/engines/test_architectures.py` checks both against the
engines.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from fopd_cli.engines.models import hf
from fopd_cli.engines.models.heads import UnknownHead, find_rule
from fopd_cli.engines.tokens import rope
from fopd_cli.errors import UserError

# Layers that look back at positions, or at none. Any other kind (state space, linear attention, short
# convolution) carries a state along.
STATELESS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "global",
    "local",
    "moe",
    "mlp",
}
# in the name of a kind: it chooses what to attend to among all positions of a row
WHOLE_ROW = ("index", "compress", "sparse")
OWN_MASKS = {"doge"}  # these compute with the row's mask before they attend
LOOK_AHEAD = {"paligemma"}  # these let a prompt attend to itself in both directions


def check_architecture(config: Any, key: str) -> None:
    """Raise `UserError` unless it is a causal language model whose hidden states and output head can be
    separated.
    """
    problem = refusal(config)
    if problem is not None:
        raise UserError(
            f"{key}: {config.model_type} {problem}; see docs/models.md for architectures that can be "
            "distilled"
        )


def refusal(config: Any) -> str | None:
    """Why this architecture cannot be a student or a teacher on transformers, as the end of a sentence; None
    if it can.
    """
    try:
        architecture = hf.model_class(config)
    except (ImportError, AttributeError) as error:
        return f"cannot be loaded by transformers here ({_first_line(error)})"
    if (method := quantized(config)) is not None:
        return (
            f"is quantized ({method}), and only whole weights are distilled here; take the checkpoint in bf16"
        )
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder, and only decoders are distilled"
    if config.model_type in LOOK_AHEAD:
        return "lets a prompt look ahead, and only causal language models are distilled"
    if architecture is None:
        return "is no causal language model that transformers knows"
    try:
        model: Any = hf.empty_model(config, torch.float32)
        hf.blocks(model)
        head = model.get_output_embeddings()
    except UserError as error:
        return f"cannot be taken apart ({error})"
    except Exception as error:  # each architecture's own code runs here
        return f"cannot be built by transformers here ({_first_line(error)})"
    if head is None or getattr(head, "weight", None) is None or head.weight.dim() != 2:
        return "has no output head that turns hidden states into logits"
    try:
        find_rule(model, hf.backbone(model))
    except UnknownHead as error:
        return str(error)
    return None


def quantized(config: Any) -> str | None:
    """How its weights are quantized; None if they are not."""
    found = getattr(config, "quantization_config", None) or getattr(
        hf.text_config(config), "quantization_config", None
    )
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def packing_refusal(config: Any) -> str | None:
    """Why its samples cannot share one row, as the end of a sentence; None if no reason is known.

    What this allows is still probed on the loaded model itself (`packing.py`).
    """
    architecture = hf.model_class(config)
    if keeps_state(config):
        return "keeps a state from token to token, which would run on from one sample into the next"
    if not architecture._supports_attention_backend or config.model_type in OWN_MASKS:
        return "computes its attention by itself, and knows no rows of several samples"
    own = [kind for kind in layer_types(config) if any(word in kind for word in WHOLE_ROW)]
    if not own and hf.asks_which_attention(hf.empty_model(config)):
        return "computes another attention where it is not PyTorch's by name, and so cannot be given ours"
    if own:
        return f"has layers ({own[0]}) that choose what to attend to over the whole row"
    return None


def bears_no_padding(config: Any) -> bool:
    """Whether rows of a batch must not be padded on the left: padding would become part of a state, or of
    what layers choose from.
    """
    return keeps_state(config) or any(any(word in kind for word in WHOLE_ROW) for kind in layer_types(config))


def reads_in_pieces(model: Any) -> bool:
    """Whether a sequence can be computed some columns at a time, after the cache of those before. `model` may
    be on the meta device.
    """
    # A state needs whole prompts, and a piece of a sequence does not show its length.
    if bears_no_padding(model.config) or rope.by_length(model.config):
        return False
    return "past_key_values" in inspect.signature(model.forward).parameters


def keeps_state(config: Any) -> bool:
    """Whether it carries a state from token to token."""
    architecture = hf.model_class(config)
    if architecture is not None and getattr(architecture, "_is_stateful", False):
        return True
    own = [kind for kind in layer_types(config) if not any(word in kind for word in WHOLE_ROW)]
    return any(kind not in STATELESS for kind in own)


def vllm_refusal(config: Any) -> str | None:
    """Why vLLM would compute something different from the learner; None if no reason is known."""
    if "dynamic" in rope.kinds(config):
        return (
            "scales its rotary embedding by the length of a sequence (dynamic NTK), and vLLM does so "
            "in another way"
        )
    return None


def publishing_refusal(config: Any) -> str | None:
    """Why a student's weights could not be sent to vLLM; None if no reason is known."""
    architecture = hf.model_class(config)
    if architecture is not None and architecture.config_class is not type(config):
        return (
            "is loaded by vLLM with its vision tower, and trained here without, so that its weights "
            "could not be updated"
        )
    return None


def layer_types(config: Any) -> tuple[str, ...]:
    """The kinds of its layers, if its configuration names them."""
    return tuple(dict.fromkeys(getattr(hf.text_config(config), "layer_types", None) or ()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
