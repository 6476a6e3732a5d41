"""A vision-language model distilled as text: the language model learns, the tower stays, both are saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import architectures
import learner_kit as kit
import torch
from conftest import SLOW, Fopd, small_recipe

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf


def vision_pair(pair: Path, folder: Path) -> Path:
    """Student and teacher with the byte tokenizer's ids."""
    shutil.copytree(pair, folder)
    for seed, role in enumerate(("student", "teacher")):
        config = architectures.ARCHITECTURES["qwen2_vl"]()
        config.text_config.vocab_size = kit.VOCAB
        config.text_config.max_position_embeddings = 512
        architectures.make(config, hf._auto(config), seed).save_pretrained(folder / role)
        generation = folder / role / "generation_config.json"
        generation.write_text(json.dumps({"eos_token_id": 1}))
    return folder


def tower(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "visual" in name}


def make_learner(pair: Path) -> FsdpLearner:
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    hf.freeze_unused(model)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    return FsdpLearner(model, [head], kit.config(lr=1e-2), kit.CPU, 0, 1)


def test_the_tower_does_not_learn_and_a_checkpoint_goes_without_it(pair: Path, tmp_path: Path) -> None:
    folder = vision_pair(pair, tmp_path / "pair")
    samples = kit.make_samples(folder, count=3, width=32)
    learner = make_learner(folder)
    before = {name: tensor.clone() for name, tensor in learner.student.lm.state_dict().items()}
    for step in range(2):
        learner.train(step, samples)
    after = dict(learner.publish())
    frozen = tower(learner.student.lm)
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items() if name not in frozen)
    extra = kit.save(learner, tmp_path / "saved")
    again = make_learner(folder)
    again.restore(tmp_path / "saved", extra)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.publish())


@SLOW
def test_a_run_leaves_a_whole_model(fopd: Fopd, pair: Path) -> None:
    folder = vision_pair(pair, fopd.folder / "pair")
    run = fopd.run(small_recipe(folder, learner={"steps": 2}))
    found, before = (hf.load_model(str(f), "m", torch.float32) for f in (run / "student", folder / "student"))
    for name, tensor in tower(before).items():
        torch.testing.assert_close(tower(found)[name], tensor, rtol=0, atol=0)
    assert not torch.equal(found.lm_head.weight, before.lm_head.weight)
