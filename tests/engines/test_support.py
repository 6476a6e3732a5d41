"""What cannot be distilled, or not this way, is reported in one line before weights load or workers start."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from conftest import Fopd, small_recipe
from safetensors.torch import load_file

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.models.checkpoint_format import in_checkpoint_format
from fopd_cli.engines.transformers import cpu_attention
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.errors import UserError


def folder_of(config: Any, pair: Path, out: Path) -> str:
    """A model directory with a configuration and a tokenizer, but no weights."""
    shutil.copytree(pair / "student", out)
    (out / "model.safetensors").unlink()
    (out / "config.json").write_text(json.dumps(config.to_dict()))
    return str(out)


def preflight(fopd: Fopd, pair: Path, model: str, **sections: Any) -> str:
    """The last line of a run that is refused."""
    recipe = small_recipe(pair, **sections)
    recipe["student"]["model"] = model
    done = fopd("run", fopd.recipe(recipe), "--run-dir", fopd.folder / "run", code=2)
    assert not (fopd.folder / "run" / "logs").exists()  # no worker was started
    return done.err.strip().splitlines()[-1]


def test_an_encoder_decoder_ends_in_one_line(fopd: Fopd, pair: Path) -> None:
    model = folder_of(architectures.ARCHITECTURES["t5"](), pair, fopd.folder / "t5")
    said = preflight(fopd, pair, model)
    assert "student.model: t5 is an encoder-decoder, and only decoders are distilled" in said


def test_a_state_and_packing_end_in_one_line(fopd: Fopd, pair: Path) -> None:
    config = architectures.ARCHITECTURES["lfm2"]()
    config.vocab_size = 260
    model = folder_of(config, pair, fopd.folder / "lfm2")
    architectures.make(config, hf._auto(config)).save_pretrained(model)
    said = preflight(fopd, pair, model)
    assert "learner.packing: lfm2 keeps a state from token to token" in said
    assert "set learner.packing: false" in said


@pytest.mark.parametrize(
    "name", ["lfm2", "minimax", "mamba", "qwen3_5", "falcon_h1", "recurrent_gemma", "zamba2", "nemotron_h"]
)
def test_what_keeps_a_state_is_known_by_its_configuration(name: str) -> None:
    config = architectures.ARCHITECTURES[name]()
    assert support.keeps_state(config)
    assert support.packing_refusal(config) is not None


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3", "gpt_oss", "qwen2_vl", "llama4", "deepseek_v3", "opt projected", "phi3 longrope"],
)
def test_what_attends_only_keeps_none(name: str) -> None:
    config = architectures.ARCHITECTURES[name]()
    assert support.refusal(config) is None
    assert support.packing_refusal(config) is None


def test_what_transformers_does_not_know_as_a_language_model_is_named() -> None:
    from transformers import ViTConfig

    with pytest.raises(
        UserError, match=r"^teacher\.model: vit is no causal language model that transformers knows"
    ):
        support.check_architecture(ViTConfig(), "teacher.model")


@pytest.mark.parametrize(
    ("name", "asks"), [("deepseek_v32", True), ("hy_v4", True), ("llama", False), ("gpt2", False)]
)
def test_what_asks_for_its_attention_by_name_is_given_none_of_ours(name: str, asks: bool) -> None:
    """Sparse attention silently skips its choice of keys if the name is not PyTorch's."""
    config = architectures.ARCHITECTURES[name]()
    model = hf.empty_model(config)
    assert hf.asks_which_attention(model) == asks
    cpu_attention.enable(model)
    assert (model.config._attn_implementation == hf.own_attention(type(model), config)) == asks
    assert (support.packing_refusal(config) is not None) == asks


def test_quantized_weights_are_refused_and_the_method_is_named() -> None:
    config = architectures.ARCHITECTURES["llama"]()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert "is quantized (gptq)" in (support.refusal(config) or "")


def test_the_width_of_hidden_states_is_the_heads() -> None:
    config = architectures.ARCHITECTURES["opt projected"]()
    assert config.hidden_size == 32
    assert hf.hidden_width(config) == 16


def test_asking_about_a_configuration_leaves_a_living_models_alone() -> None:
    config = architectures.ARCHITECTURES["llama"]()
    model = architectures.make(config, hf._auto(config))
    model.set_attn_implementation("eager")
    hf.hidden_width(model.config)
    support.refusal(model.config)
    assert model.config._attn_implementation == "eager"


def test_a_rope_that_vllm_scales_otherwise_is_refused_for_it() -> None:
    assert "dynamic NTK" in (support.vllm_refusal(architectures.ARCHITECTURES["llama dynamic"]()) or "")
    for name in ("llama", "phi3 longrope", "llama yarn"):
        assert support.vllm_refusal(architectures.ARCHITECTURES[name]()) is None


@pytest.mark.parametrize(
    ("name", "refused"), [("qwen3_5", True), ("llama4", True), ("qwen2_vl", False), ("qwen3_5_text", False)]
)
def test_a_language_model_without_its_tower_is_not_sent_to_vllm(name: str, refused: bool) -> None:
    assert (support.publishing_refusal(architectures.ARCHITECTURES[name]()) is not None) == refused


def test_what_vllm_only_logs_becomes_part_of_the_error() -> None:
    logger = logging.getLogger("vllm.model_executor.models.registry")
    with vllm_engine.logged_causes() as causes:
        try:
            raise RuntimeError(
                "Error raised in subprocess:\nTraceback ...\nModuleNotFoundError: No module named "
                "'torchvision'\n"
            )
        except RuntimeError:
            logger.exception("Error in inspecting model architecture '%s'", "X")
    assert causes == ["ModuleNotFoundError: No module named 'torchvision'"]
    logger.error("afterwards")
    assert len(causes) == 1


@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_an_update_of_vllm_is_named_as_the_checkpoints_files_are(name: str, tmp_path: Path) -> None:
    """transformers fuses experts when it loads them; vLLM reads what the files hold."""
    config = architectures.ARCHITECTURES[name]()
    architectures.make(config, hf._auto(config)).save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    published = lora.merged(hf.load_model(str(tmp_path), "m", torch.float32))
    found = dict(in_checkpoint_format(str(tmp_path), published))
    assert found.keys() == files.keys()
    for key, tensor in files.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
