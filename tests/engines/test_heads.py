"""Logits that change after the head: detected from an architecture's own code, and applied by teacher,
learner and vLLM alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import tiny_models
import torch
from conftest import Fopd, lines, small_recipe

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.errors import UserError
from fopd_cli.samples import Rollout, TeacherTargets

ALTERED = [
    "gemma2",
    "nanochat",
    "recurrent_gemma",
    "granite",
    "granitemoe",
    "cohere",
    "phi",
    "gptj",
    "falcon_h1",
]


@pytest.mark.parametrize("architecture", ["llama", *ALTERED])
def test_logits_from_hidden_states_are_the_models_own(architecture: str) -> None:
    model = tiny_models.tiny_model(architecture)
    ids = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = hf.backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits
        head = hf.head_rule(model.config, "m").head(model)
        found = head.logits(hidden)
        out = torch.empty(18, tiny_models.VOCAB)
        head.uncapped(hidden.flatten(0, 1), out)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    product = hidden @ head.weight.T
    # The case is worth its name: taken as a bare product, the distribution would be another one by tenths of
    # nats.
    apart = (torch.log_softmax(product, -1) - torch.log_softmax(expected, -1)).abs().max()
    assert (apart > 0.3) == (architecture != "llama")
    uncapped = out if head.cap is None else head.cap * torch.tanh(out / head.cap)
    torch.testing.assert_close(uncapped, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_cap_that_is_hardly_felt_is_found_all_the_same() -> None:
    """Logits are small, as in a fresh checkpoint, so a probe of the model itself would not show it."""
    rule = hf.head_rule(tiny_models.tiny_model("gemma2", logits=0.01).config, "m")
    assert rule.cap == pytest.approx(6.0, rel=1e-6)
    assert rule.scale == 1
    assert hf.head_rule(
        tiny_models.tiny_model("granite", logits_scaling=1.03).config, "m"
    ).scale == pytest.approx(1 / 1.03)


class Squared(torch.nn.Module):
    """Does something after the head that no rule describes."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e-3 * logits.square()


def test_what_is_not_understood_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    roberta = AutoConfig.for_model(
        "roberta", is_decoder=True, hidden_size=16, num_attention_heads=1, vocab_size=50
    )
    with pytest.raises(UserError, match=r"student.model: .*RobertaForCausalLM"):
        hf.head_rule(roberta, "student.model")
    own = LlamaForCausalLM.forward

    def altered(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        out.logits = Squared()(out.logits)
        return out

    config = tiny_models.tiny_model("llama").config
    monkeypatch.setattr(LlamaForCausalLM, "forward", altered)
    with pytest.raises(UserError, match="LlamaForCausalLM does something between hidden states and logits"):
        hf.head_rule(config, "student.model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> dict[str, Path]:
    """Student and teacher by architecture: a cap learns from a bias, a bias from a scale, a scale from a
    cap.
    """
    found = {}
    for student, teacher in (("gemma2", "phi"), ("phi", "granite"), ("cohere", "nanochat")):
        folder = found[student] = tmp_path_factory.mktemp(student)
        wide = {"hidden_size": 64, "head_dim": 32} if teacher != "phi" else {"hidden_size": 64}
        tiny_models.save(tiny_models.tiny_model(student), folder / "student", pair / "student")
        tiny_models.save(
            tiny_models.tiny_model(teacher, seed=1, **wide), folder / "teacher", pair / "student"
        )
    return found


@pytest.mark.parametrize("student", ["gemma2", "phi", "cohere"])
def test_the_learners_step_is_plain_pytorch(pairs: dict[str, Path], student: str) -> None:
    """All gradients, including the head's bias, and drifts of 0 if the weights are those that sampled."""
    folder = pairs[student]
    samples = kit.make_samples(folder, count=4, width=64)
    cfg = kit.config(policy="reweight+anchor", anchor=1.0)
    loss, expected = kit.reference(folder, samples, cfg)
    learner = kit.make_learner(folder, cfg)
    report = learner.train(0, samples)
    assert report.loss == pytest.approx(loss, rel=1e-4)
    found = kit.gradients(learner)
    assert set(found) == set(expected)
    assert ("lm_head.bias" in found) == (student == "phi")
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-3, atol=1e-5 * scale + 1e-7, err_msg=name
        )
    fresh = kit.make_samples(folder, count=4, width=64, drifted=False)
    assert np.abs(kit.make_learner(folder, cfg).evaluate(fresh).drift_roll).max() < 1e-7
    assert dict(learner.publish()).keys() >= ({"lm_head.bias"} if student == "phi" else set())


def rank_step(rank: int, world: int, folder: Path, samples: Any, cfg: Any) -> Any:
    learner = kit.make_learner(folder, cfg, rank, world)
    report = learner.train(0, samples)
    return report.loss, kit.gradients(learner)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["gemma2", "phi", "cohere"])
def test_two_ranks_are_plain_pytorch(pairs: dict[str, Path], student: str, tmp_path: Path) -> None:
    samples = kit.make_samples(pairs[student], count=4, width=64)
    cfg = kit.config()
    loss, expected = kit.reference(pairs[student], samples, cfg)
    on_ranks, found = kit.on_ranks(2, tmp_path, rank_step, pairs[student], samples, cfg)
    assert on_ranks == pytest.approx(loss, rel=1e-4)
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(
            found[name], expected[name], rtol=1e-3, atol=1e-5 * scale + 1e-7, err_msg=name
        )


@pytest.mark.parametrize("architecture", ["gemma2", "phi", "granite"])
def test_a_teachers_top_k_is_its_own_distribution(architecture: str, tmp_path: Path, pair: Path) -> None:
    model = tiny_models.tiny_model(architecture)
    ids = np.arange(5, 17, dtype=np.int32)
    rollout = Rollout(
        key=0,
        token_ids=ids,
        prompt_length=3,
        logprobs=np.zeros(9, np.float32),
        loss_mask=np.ones(9, bool),
        spans=[(0, 0, 9)],
        finish="length",
    )
    target = TeacherTargets(
        "topk",
        logprobs=torch.zeros(9),
        topk_logprobs=torch.zeros(9, 5),
        topk_ids=torch.zeros(9, 5, dtype=torch.int32),
    )
    with torch.no_grad():
        full = torch.log_softmax(model(torch.from_numpy(ids).long()[None]).logits[0, 2:-1, :250], -1)
    TransformersTeacher(model, kit.CPU, 1, 4096, 250, 64, packing=False).score([rollout], [target])
    assert target.logprobs is not None
    assert target.topk_logprobs is not None
    assert target.topk_ids is not None
    own = full.gather(-1, torch.from_numpy(ids[3:]).long()[:, None])[:, 0]
    torch.testing.assert_close(target.logprobs, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.topk_logprobs, full.topk(5).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        full.gather(-1, target.topk_ids.long()), target.topk_logprobs, rtol=1e-5, atol=1e-5
    )
    head = hf.load_head(str(tiny_models.save(model, tmp_path / "m", pair / "student")), "m", torch.float32)
    assert head.cap == hf.head_rule(model.config, "m").cap
    torch.testing.assert_close(replace(head, bias=None).weight, model.get_output_embeddings().weight.detach())
    assert (head.bias is not None) == (architecture == "phi")


@pytest.mark.slow
def test_a_run_and_its_evaluation(fopd: Fopd, pairs: dict[str, Path]) -> None:
    """A capped student under a teacher with a bias, from preflight to `fopd eval`."""
    run = fopd.run(small_recipe(pairs["gemma2"], learner={"steps": 2}))
    steps = [record for record in lines(run / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 2
    assert steps[0]["drift_roll"] < 1e-6
    fopd("eval", run)
    loaded = hf.load_model(str(run / "student"), "m", torch.float32)
    assert hf.head_rule(loaded.config, "m").cap == pytest.approx(6.0)
