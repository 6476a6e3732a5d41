"""Adapters: their gradients against plain autograd, what is published and saved, on one rank and two, in fp32
and bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
from conftest import SLOW, Fopd, check_accounts, metrics, small_recipe, summary
from peft import LoraConfig, PeftModel, get_peft_model

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig
from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.samples import Sample


@pytest.fixture(scope="module")
def samples(pair: Path) -> list[Sample]:
    return kit.make_samples(pair)


def student(pair: Path, dtype: torch.dtype = torch.float32, targets: Any = "all-linear") -> Any:
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    lora.add_adapters(model, 4, 8.0, targets, 0, dtype)
    return model


def make_learner(pair: Path, cfg: LearnerConfig, rank: int = 0, world: int = 1) -> FsdpLearner:
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    return FsdpLearner(student(pair, cfg.compute_dtype), [head], cfg, kit.CPU, rank, world)


def test_untrained_adapters_are_the_model_itself(pair: Path) -> None:
    plain = dict(lora.merged(hf.load_model(str(pair / "student"), "m", torch.float32)))
    adapted = dict(lora.merged(student(pair)))
    assert plain.keys() == adapted.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, adapted[name]), name


def test_only_adapters_learn_and_what_is_published_is_what_they_compute(
    pair: Path, samples: list[Sample]
) -> None:
    learner = make_learner(pair, kit.config(lr=1e-2, activation_checkpointing=True))
    base = {n: p.detach().clone() for n, p in learner.student.lm.named_parameters() if not p.requires_grad}
    losses = [learner.train(i, samples).loss for i in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    after = dict(learner.student.lm.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())
    trained = [p for p in learner.student.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.2 * sum(p.numel() for p in base.values())
    plain = hf.load_model(str(pair / "student"), "m", torch.float32)
    plain.load_state_dict(dict(learner.publish()), strict=False)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            plain(ids).logits,
            learner.student.lm(ids, cu_seq_lens_q=torch.tensor([0, 30]), max_length_q=30).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_adapters_get_the_gradients_of_plain_autograd(pair: Path, samples: list[Sample]) -> None:
    """dW = the full gradient of the merged weight; A and B get B' dW and dW A', scaled."""
    _, full = kit.reference(pair, samples, kit.config())
    learner = make_learner(pair, kit.config())
    for name, parameter in learner.student.lm.named_parameters():
        if ".lora_B." in name:  # 0 to begin with: B' dW would say nothing
            torch.nn.init.normal_(parameter, std=1e-6)
    learner.train(0, samples)
    checked = 0
    for name, module in learner.student.lm.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A[lora.ADAPTER].weight, module.lora_B[lora.ADAPTER].weight
            expected = torch.from_numpy(full[f"{name}.weight"]) * 2.0
            torch.testing.assert_close(b.grad, expected @ _before(a, learner).T, rtol=1e-3, atol=1e-6)
            checked += 1
    assert checked == 7 * len(hf.blocks(learner.student.lm))


def _before(parameter: torch.Tensor, learner: FsdpLearner) -> torch.Tensor:
    """The weights before AdamW's first step, which is -lr sign(gradient) up to epsilon."""
    group, state = learner.optimizer.param_groups[0], learner.optimizer.state[parameter]
    m = state["exp_avg"] / (1 - group["betas"][0])
    v = state["exp_avg_sq"] / (1 - group["betas"][1])
    return parameter.detach() + group["lr"] * m / (v.sqrt() + group["eps"])


def rank_train(
    rank: int, world: int, pair: Path, samples: list[Sample], cfg: LearnerConfig, folder: Path
) -> Any:
    learner = make_learner(pair, cfg, rank, world)
    losses = [learner.train(i, samples).loss for i in range(3)]
    published = {name: tensor.float().clone().numpy() for name, tensor in learner.publish()}
    return losses, published, kit.save(learner, folder)


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)])
def test_sharded_adapters_are_those_of_one_rank(
    pair: Path, samples: list[Sample], tmp_path: Path, world: int, dtype: torch.dtype
) -> None:
    cfg = kit.config()
    alone = make_learner(pair, cfg)
    expected = [alone.train(i, samples).loss for i in range(3)]
    sharded = kit.changed(cfg, compute_dtype=dtype)
    losses, published, extra = kit.on_ranks(
        world, tmp_path, rank_train, pair, samples, sharded, tmp_path / "saved"
    )
    assert losses == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 0.05)
    size = sum(f.stat().st_size for f in (tmp_path / "saved").iterdir())
    whole = sum(4 * p.numel() for p in alone.student.parameters())
    assert size < whole  # adapters and their optimizer states, not the base
    resumed = make_learner(pair, cfg)
    resumed.restore(tmp_path / "saved", extra)
    assert resumed.version == 3
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # the frozen base is kept in the compute dtype
    for name, tensor in resumed.publish():
        np.testing.assert_allclose(tensor.numpy(), published[name], atol=tolerance, err_msg=name)


def test_merged_is_what_peft_merges(pair: Path) -> None:
    """An independent reference: peft's own wrapper and its merge."""
    ours = student(pair, targets=("q_proj", "down_proj"))
    theirs = get_peft_model(
        hf.load_model(str(pair / "student"), "m", torch.float32),
        LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "down_proj"]),
    )
    assert isinstance(theirs, PeftModel)
    values = {n: torch.randn_like(p) for n, p in ours.named_parameters() if lora.is_adapter(n)}
    assert values
    for name, parameter in [*ours.named_parameters(), *theirs.named_parameters()]:
        if lora.is_adapter(name):
            parameter.data.copy_(values[name.removeprefix("base_model.model.")])
    found = dict(lora.merged(ours))
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_target_that_the_model_lacks_is_named(pair: Path) -> None:
    with pytest.raises(UserError, match=r"student\.lora\.targets: .*c_attn"):
        student(pair, targets=("c_attn",))


@SLOW
def test_a_run_with_adapters_stopped_and_resumed(fopd: Fopd, pair: Path) -> None:
    """Bitwise the metrics of an uninterrupted run; it leaves a plain model, whatever the learner held."""
    recipe = small_recipe(pair, learner={"steps": 6, "lr": 1e-2, "activation_checkpointing": True})
    recipe["student"]["lora"] = {"rank": 4, "alpha": 8}
    whole = fopd.run(recipe, "whole")
    assert summary(whole)["kl_last"] < 0.9 * summary(whole)["kl_first"]
    fopd.run(recipe, "parts", "--set", "learner.steps=3")
    fopd("resume", fopd.folder / "parts", "--set", "learner.steps=6")
    assert metrics(fopd.folder / "parts")[-1] == metrics(whole)[-1]
    check_accounts(whole)
    found, before = (
        hf.load_model(str(f), "m", torch.float32).state_dict() for f in (whole / "student", pair / "student")
    )
    assert found.keys() == before.keys()
    fopd("export", whole, fopd.folder / "adapter", "--adapter")
    again = PeftModel.from_pretrained(
        hf.load_model(str(pair / "student"), "m", torch.float32), fopd.folder / "adapter"
    )
    for name, tensor in again.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, found[name], rtol=1e-5, atol=1e-6)
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert changed == {n for n in before if "_proj" in n}


def test_adapters_that_do_not_fit_end_in_one_line(fopd: Fopd, pair: Path) -> None:
    recipe = small_recipe(pair)
    recipe["student"]["lora"] = {"targets": ["c_attn"]}
    done = fopd("run", fopd.recipe(recipe), "--run-dir", fopd.folder / "run", code=2)
    assert "student.lora.targets" in done.err
    assert "c_attn" in done.err
