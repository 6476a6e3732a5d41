"""Adapters on mixtures of experts: experts are adapted and published merged, routers only on request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import architectures
import learner_kit as kit
import numpy as np
import pytest
import torch

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.samples import Sample

MIXTURES = ("qwen3_moe", "deepseek_v3", "olmoe", "granitemoe", "gpt_oss")


def saved(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    config = architectures.ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    architectures.make(config, hf._auto(config), seed).save_pretrained(folder)
    return folder


def adapted(folder: Path, targets: Any = "all-linear", router: bool = False) -> Any:
    lm = hf.load_model(str(folder), "m", torch.float32)
    lora.add_adapters(lm, 2, 4.0, targets, 0, torch.float32, router)
    for name, parameter in lm.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return lm


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_what_is_published_is_what_base_and_adapters_compute(name: str, router: bool, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    lm = adapted(folder, router=router)
    plain = hf.load_model(str(folder), "m", torch.float32)
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    published = dict(lora.merged(lm))
    assert published.keys() == before.keys()
    plain.load_state_dict(published)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(plain(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)
    changed = {n for n, t in before.items() if not torch.equal(t, published[n])}
    assert any("experts" in n or "_linear" in n for n in changed)
    routers = {n for n in before if ".gate.weight" in n or ("router" in n and n.endswith("weight"))}
    assert routers
    assert (routers <= changed) if router else not (routers & changed)


@torch.no_grad()
def test_experts_are_merged_by_the_formula(tmp_path: Path) -> None:
    """W_e + (alpha / rank) B_e A_e for every expert, computed from the adapters' stored layout."""
    lm = adapted(saved("qwen3_moe", tmp_path), ["down_proj"])
    published = dict(lora.merged(lm))
    base = hf.load_model(str(tmp_path), "m", torch.float32).state_dict()
    experts, rank = 4, 2
    layer = lm.model.layers[1].mlp.experts
    a, b = layer.lora_A[lora.ADAPTER].weight, layer.lora_B[lora.ADAPTER].weight
    name = "model.layers.1.mlp.experts.down_proj"
    for e in range(experts):
        delta = b[:, [r * experts + e for r in range(rank)]] @ a[e * rank : (e + 1) * rank]
        torch.testing.assert_close(published[name][e], base[name][e] + 2.0 * delta, rtol=1e-5, atol=1e-6)


def test_targets_are_layers_experts_and_their_old_names(tmp_path: Path) -> None:
    lm = adapted(saved("deepseek_v3", tmp_path), ["up_proj", "o_proj"])
    found = {n.split(".lora_")[0] for n, _ in lm.named_parameters() if ".lora_A." in n}
    assert "model.layers.0.mlp.up_proj" in found  # the dense layer before the mixtures
    assert "model.layers.1.mlp.shared_experts.up_proj" in found
    assert "model.layers.1.mlp.experts" in found
    assert "model.layers.0.self_attn.o_proj" in found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("name", "targets", "router", "said"),
    [
        ("qwen3_moe", ["c_attn"], False, r"student\.lora\.targets: .*'c_attn'; it has .*gate_up_proj"),
        ("qwen3_moe", ["q_proj", "c_attn"], False, r"student\.lora\.targets: .*'c_attn'"),
        ("llama", "all-linear", True, r"student\.lora\.router: LlamaForCausalLM has no router"),
    ],
)
def test_what_the_model_lacks_is_named(
    name: str, targets: Any, router: bool, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        adapted(saved(name, tmp_path), targets, router)


def test_adapters_of_experts_do_not_leave_alone(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path)
    with pytest.raises(
        UserError, match=r"student\.lora\.publish: model\.layers\.0\.mlp\.experts\.\w+ .* publish merged"
    ):
        lora.check_adapter_alone(adapted(folder), "student.lora.publish")
    lora.check_adapter_alone(adapted(folder, ["q_proj"]), "student.lora.publish")


@pytest.fixture(scope="module")
def mixture_pair(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher with the byte tokenizer's ids."""
    folder = tmp_path_factory.mktemp("mixtures") / "pair"
    shutil.copytree(pair, folder)
    for seed, role in enumerate(("student", "teacher")):
        saved("qwen3_moe", folder / role, seed, vocab_size=kit.VOCAB)
    return folder


def rank_train(rank: int, world: int, pair: Path, samples: list[Sample], checkpointing: bool) -> Any:
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    lora.add_adapters(model, 2, 4.0, "all-linear", 0, torch.float32, router=True)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    cfg = kit.config(lr=1e-2, activation_checkpointing=checkpointing)
    learner = FsdpLearner(model, [head], cfg, kit.CPU, rank, world)
    losses = [learner.train(i, samples).loss for i in range(3)]
    return losses, {name: tensor.float().clone().numpy() for name, tensor in learner.publish()}


@pytest.mark.slow
def test_a_sharded_mixture_learns_and_publishes_as_one_rank_does(mixture_pair: Path, tmp_path: Path) -> None:
    samples = kit.make_samples(mixture_pair, width=32)
    losses, alone = rank_train(0, 1, mixture_pair, samples, False)
    assert losses[-1] < losses[0]
    found, sharded = kit.on_ranks(2, tmp_path, rank_train, mixture_pair, samples, True)
    assert found == pytest.approx(losses, rel=1e-4)
    assert sharded.keys() == alone.keys()
    for name, tensor in alone.items():
        np.testing.assert_allclose(sharded[name], tensor, atol=2e-4, err_msg=name)
