"""The learner's step against plain PyTorch, on one rank and on two."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from fopd_cli.engines.learner.learner import FsdpLearner, LearnerConfig, lr_factor
from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.losses.terms import LossSpec
from fopd_cli.samples import Sample, StepReport, TeacherTargets

# fp32, sums in a different order; gradients here are around 0.1.
RTOL, ATOL = 1e-4, 2e-6


@pytest.fixture(scope="module")
def samples(pair: Path) -> list[Sample]:
    return kit.make_samples(pair)


def step(pair: Path, samples: list[Sample], cfg: LearnerConfig) -> tuple[StepReport, dict[str, np.ndarray]]:
    learner = kit.make_learner(pair, cfg)
    report = learner.train(0, samples)
    return report, kit.gradients(learner)


def close(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = RTOL, atol: float = ATOL
) -> None:
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


CASES = {
    "async": {},
    "by token": {"average": "token"},
    "reweight": {"policy": "reweight"},
    "anchored": {"policy": "reweight+anchor", "anchor": 2.0},
    "paced": {"policy": "reweight+anchor", "anchor": 2.0, "pace": 3.3},
}


@pytest.mark.parametrize("case", CASES)
def test_one_rank_is_plain_pytorch(pair: Path, samples: list[Sample], case: str) -> None:
    cfg = kit.config(**CASES[case])
    loss, expected = kit.reference(pair, samples, cfg)
    report, found = step(pair, samples, cfg)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    close(found, expected)


def test_the_lag_of_each_sample_decides_its_anchor(pair: Path, samples: list[Sample]) -> None:
    """A pace of 3.3 leaves an anchor of 2 alone at lag 0 and 1, bit by bit, and makes it 1.1 at lag 3."""
    spec = LossSpec("reverse_kl", "sampled", advantage="cached", importance=True)
    cfg = kit.config(policy="reweight+anchor", anchor=2.0, pace=3.3, loss=spec)
    short, long = ([s for s in samples if low <= s.lag <= high] for low, high in ((0, 1), (3, 3)))
    plain = kit.changed(cfg, pace=None)
    weaker = kit.changed(cfg, anchor=1.1, pace=None)
    for given, same, other in ((short, plain, weaker), (long, weaker, plain)):
        report, found = step(pair, given, cfg)
        alike, expected = step(pair, given, same)
        assert report.loss == pytest.approx(alike.loss, rel=0 if same is plain else 1e-5)
        close(found, expected, *((0, 0) if same is plain else (RTOL, ATOL)))
        assert report.loss != pytest.approx(step(pair, given, other)[0].loss, rel=1e-3)


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 30, 10_000])
def test_packed_padded_and_one_by_one_are_the_same(
    pair: Path, samples: list[Sample], micro_tokens: int, packing: bool, observations: bool
) -> None:
    given = kit.with_observations(samples) if observations else samples
    cfg = kit.config(policy="reweight+anchor", anchor=1.0)
    loss, expected = kit.reference(pair, given, cfg)
    report, found = step(pair, given, kit.changed(cfg, micro_tokens=micro_tokens, packing=packing))
    assert report.loss == pytest.approx(loss, rel=1e-5)
    close(found, expected)
    tokens = sum(len(s.rollout.token_ids) for s in samples)
    assert report.tokens == tokens
    assert (report.padded_tokens == tokens) == (packing or micro_tokens == 1)
    np.testing.assert_array_equal(report.stats.length, [s.rollout.loss_mask.sum() for s in given])


def test_a_sample_without_any_loss_counts_and_weighs_nothing(pair: Path, samples: list[Sample]) -> None:
    """An episode that broke off before the student said a word still counts in the batch."""
    silent = replace(samples[3].rollout, loss_mask=np.zeros(samples[3].rollout.response_length, dtype=bool))
    given = [*samples[:3], replace(samples[3], rollout=silent)]
    cfg = kit.config()
    _, expected = kit.reference(pair, samples[:3], cfg)
    report, found = step(pair, given, cfg)
    close(found, {name: 3 / 4 * g for name, g in expected.items()})
    assert report.stats.length[3] == report.stats.loss[3] == report.stats.freshness[3] == 0


def test_activation_checkpointing_and_chunks_change_nothing(pair: Path, samples: list[Sample]) -> None:
    cfg = kit.config()
    _, expected = step(pair, samples, cfg)
    chunked = LossSpec("reverse_kl", "full", chunk_bytes=4 * kit.VOCAB * 5)
    _, found = step(pair, samples, kit.changed(cfg, activation_checkpointing=True, loss=chunked))
    close(found, expected)


@pytest.mark.slow
def test_compiling_changes_nothing(pair: Path, samples: list[Sample]) -> None:
    """Several shapes, so that dynamic ones are also compiled."""
    cfg = kit.config(micro_tokens=30)
    report, expected = step(pair, samples, cfg)
    compiled, found = step(pair, samples, kit.changed(cfg, compile=True))
    assert compiled.loss == pytest.approx(report.loss, rel=1e-5)
    close(found, expected)


def rank_step(rank: int, world: int, pair: Path, samples: list[Sample], cfg: LearnerConfig) -> Any:
    learner = kit.make_learner(pair, cfg, rank, world)
    report = learner.train(0, samples)
    found = kit.gradients(learner)
    weights = {name: tensor.clone().numpy() for name, tensor in learner.publish()}
    return report, found, weights


@pytest.mark.parametrize("count", [7, 1])
def test_two_ranks_are_plain_pytorch(pair: Path, samples: list[Sample], tmp_path: Path, count: int) -> None:
    """With one sample the second rank has none and must still join in."""
    cfg = kit.config(policy="reweight+anchor", anchor=1.0)
    loss, expected = kit.reference(pair, samples[:count], cfg)
    report, found, weights = kit.on_ranks(2, tmp_path, rank_step, pair, samples[:count], cfg)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    close(found, expected)
    alone = kit.make_learner(pair, cfg)
    one = alone.train(0, samples[:count])
    for name in ("keys", "lag", "length", "loss", "kl", "drift_roll", "freshness", "weight"):
        np.testing.assert_allclose(
            getattr(report.stats, name), getattr(one.stats, name), rtol=1e-4, atol=1e-6
        )
    # AdamW's first step is lr * sign(gradient), which a gradient of rounding size can flip: most weights must
    # agree.
    published = dict(alone.publish())
    agree = np.concatenate(
        [np.isclose(weights[n], published[n].numpy(), atol=1e-5).ravel() for n in published]
    )
    assert agree.mean() > 0.999
    assert report.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def rank_memory(rank: int, world: int, pair: Path, samples: list[Sample], cfg: LearnerConfig) -> Any:
    """Gradients after a step of several micro-batches, and the bytes of whole gradients that FSDP held before
    each.
    """
    learner, held = kit.make_learner(pair, cfg, rank, world), []
    forward = learner._forward

    def measured(*args: Any) -> Any:
        held.append(sum(_whole_gradient_bytes(p) for p in _sharded_parameters(learner.student)))
        return forward(*args)

    learner._forward = measured  # type: ignore[method-assign]
    learner.train(0, samples)
    return kit.gradients(learner), held


def _sharded_parameters(student: Any) -> list[Any]:
    """FSDP's own record of each parameter."""
    states = [m._get_fsdp_state() for m in student.modules() if isinstance(m, FSDPModule)]
    return [p for state in states for group in state._fsdp_param_groups for p in group.fsdp_params]


def _whole_gradient_bytes(parameter: Any) -> int:
    whole = getattr(parameter, "_unsharded_param", None)
    held = [parameter.unsharded_accumulated_grad, None if whole is None else whole.grad]
    return sum(g.nbytes for g in held if g is not None)


def test_no_rank_keeps_whole_gradients_between_micro_batches(
    pair: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cfg = kit.config(micro_tokens=12)
    _, expected = kit.reference(pair, samples, cfg)
    found, held = kit.on_ranks(2, tmp_path, rank_memory, pair, samples, cfg)
    assert len(held) > 2
    assert held == [0] * len(held)
    close(found, expected)


def rank_bf16(rank: int, world: int, pair: Path, samples: list[Sample]) -> Any:
    cfg = kit.config(compute_dtype=torch.bfloat16, clip=1.0)
    learner = kit.make_learner(pair, cfg, rank, world)
    masters = {str(p.dtype) for p in learner.student.parameters()}
    reports = [learner.train(i, samples) for i in range(5)]
    return reports, masters, kit.gradients(learner)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_compute_keeps_fp32_masters(
    pair: Path, samples: list[Sample], tmp_path: Path, world: int
) -> None:
    reports, masters, _ = kit.on_ranks(world, tmp_path, rank_bf16, pair, samples)
    loss, _ = kit.reference(pair, samples, kit.config())
    assert masters == {"torch.float32"}
    assert reports[0].loss == pytest.approx(loss, rel=0.05)
    assert reports[-1].loss < reports[0].loss


def rank_trained(rank: int, world: int, pair: Path, samples: list[Sample], cfg: LearnerConfig) -> Any:
    learner = kit.make_learner(pair, cfg, rank, world)
    reports = [learner.train(i, samples) for i in range(3)]
    return reports, {name: tensor.clone().numpy() for name, tensor in learner.publish()}


@pytest.mark.parametrize("world", [1, 2])
def test_offloading_changes_nothing(pair: Path, samples: list[Sample], tmp_path: Path, world: int) -> None:
    cfg = kit.config(clip=1.0, weight_decay=0.1, policy="reweight", weights="normalized")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    there, expected = kit.on_ranks(world, tmp_path / "a", rank_trained, pair, samples, cfg)
    offloaded, found = kit.on_ranks(
        world, tmp_path / "b", rank_trained, pair, samples, kit.changed(cfg, offload=True)
    )
    assert [r.loss for r in offloaded] == pytest.approx([r.loss for r in there], rel=1e-4)
    assert [r.grad_norm for r in offloaded] == pytest.approx([r.grad_norm for r in there], rel=1e-3)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4, err_msg=name)


def test_optimizer_states_may_rest_in_bf16(pair: Path, samples: list[Sample], tmp_path: Path) -> None:
    """The first update is the same to the bit, later ones nearly so; saving and reading changes nothing."""
    cfg = kit.config()
    whole, narrow = (
        kit.make_learner(pair, cfg),
        kit.make_learner(pair, kit.changed(cfg, optimizer_dtype="bf16")),
    )
    losses = [(whole.train(i, samples).loss, narrow.train(i, samples).loss) for i in range(2)]
    assert losses[1][0] == losses[1][1]
    states = [s[name] for s in narrow.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {s.dtype for s in states} == {torch.bfloat16}
    extra = kit.save(narrow, tmp_path / "saved")
    resumed = kit.make_learner(pair, kit.changed(cfg, optimizer_dtype="bf16"))
    resumed.restore(tmp_path / "saved", extra)
    for i in range(2, 6):
        found = narrow.train(i, samples).loss
        assert resumed.train(i, samples).loss == found
        assert found == pytest.approx(whole.train(i, samples).loss, rel=0.02)


def test_normalized_weights_divide_by_their_mean(pair: Path, samples: list[Sample]) -> None:
    cfg = kit.config(policy="reweight")
    raw, raw_gradients = step(pair, samples, cfg)
    normalized, found = step(pair, samples, kit.changed(cfg, weights="normalized"))
    mean = raw.stats.weight.mean()
    assert normalized.loss == pytest.approx(raw.loss / mean, rel=1e-5)
    close(found, {name: g / mean for name, g in raw_gradients.items()})


def test_step_scale_multiplies_the_learning_rate(pair: Path, samples: list[Sample]) -> None:
    cfg = kit.config(policy="reweight", step_scale="freshness")
    report, _ = step(pair, samples, cfg)
    assert report.lr == pytest.approx(1e-3 * report.stats.weight.mean())


def test_the_anchor_pulls_towards_the_policy_that_sampled(pair: Path) -> None:
    """With only the anchor to follow, drift falls; without it, drift grows."""
    fresh = kit.make_samples(pair, drifted=False)
    end = {}
    for anchor in (0.0, 100.0):
        learner = kit.make_learner(pair, kit.config(policy="reweight+anchor", anchor=anchor))
        for i in range(6):
            report = learner.train(i, fresh)
        end[anchor] = report.stats.drift_roll.mean()
    assert end[100.0] < 0.5 * end[0.0]


def test_when_everything_is_gated_nothing_is_updated(pair: Path, samples: list[Sample]) -> None:
    learner = kit.make_learner(pair, kit.config(policy="reweight", xi=2.0, weights="normalized"))
    before = {n: t.clone() for n, t in learner.publish()}
    report = learner.train(0, samples)
    assert report.skipped
    assert learner.version == 1
    assert all(torch.equal(before[n], t) for n, t in learner.publish())


def test_a_cached_label_stands_where_the_current_context_is_gone(pair: Path, samples: list[Sample]) -> None:
    """As if the second half of each sample could not be found: cached labels still teach it, current ones
    cannot.
    """
    halves = []
    for s in samples:
        n = len(s.rollout.loss_mask)
        aligned = (torch.arange(n) < (n + 1) // 2).int()
        halves.append(replace(s, targets=replace(s.targets, drift=torch.zeros(n), aligned=aligned)))
    # What `current` trains on: the same samples whose second half was not sampled, as far as the loss knows.
    cut = [
        replace(
            s, rollout=replace(s.rollout, loss_mask=s.rollout.loss_mask & h.targets.aligned.bool().numpy())
        )
        for s, h in zip(samples, halves, strict=True)
    ]
    whole, whole_gradient = step(pair, samples, kit.config())
    cached, cached_gradient = step(pair, halves, kit.config(labels="cached"))
    close(cached_gradient, whole_gradient)
    np.testing.assert_allclose(cached.stats.loss, whole.stats.loss, rtol=1e-6)
    current, current_gradient = step(pair, halves, kit.config(labels="current"))
    close(current_gradient, step(pair, cut, kit.config())[1])
    assert not np.allclose(current.stats.loss, whole.stats.loss, rtol=1e-2)
    expected = [h.targets.aligned.sum().item() / len(h.rollout.loss_mask) for h in halves]
    for found in (cached, current):
        np.testing.assert_allclose(found.stats.coverage_sup, expected)


def test_student_as_its_own_teacher_has_no_loss(pair: Path) -> None:
    """On policy, judged by itself: loss, drift and gradient are 0 up to rounding."""
    same = pair / "same"
    if not same.exists():
        same.mkdir()
        for name in ("student", "teacher"):
            (same / name).symlink_to(pair / "student")
    sampled = kit.make_samples(same, drifted=False, width=96)
    learner = kit.make_learner(same, kit.config())
    report = learner.train(0, sampled)
    assert abs(report.stats.kl).max() < 1e-5
    assert abs(report.stats.drift_roll).max() < 1e-8
    assert report.grad_norm < 1e-3


def test_measuring_learns_nothing_and_sees_the_same(pair: Path, samples: list[Sample]) -> None:
    learner = kit.make_learner(pair, kit.config())
    before = {n: t.clone() for n, t in learner.publish()}
    stats = learner.evaluate(samples)
    assert all(torch.equal(before[n], t) for n, t in learner.publish())
    report = learner.train(0, samples)
    np.testing.assert_allclose(stats.kl, report.stats.kl, rtol=1e-5)


def test_the_noise_floor_comes_from_samples_without_lag(pair: Path, samples: list[Sample]) -> None:
    learner = kit.make_learner(pair, kit.config(policy="reweight"))
    first = learner.train(0, samples)
    assert first.noise_floor == 0
    expected = first.stats.drift_roll[first.stats.lag == 0].mean()
    assert learner.floor.value == pytest.approx(expected)
    second = learner.train(1, samples)
    assert second.noise_floor == pytest.approx(expected)
    f = np.exp(-np.sqrt(np.maximum(0, second.stats.drift_roll - expected))) / (second.stats.lag + 1)
    np.testing.assert_allclose(second.stats.freshness, f, rtol=1e-4)


def rank_save(rank: int, world: int, pair: Path, samples: list[Sample], folder: Path) -> Any:
    learner = kit.make_learner(pair, kit.config(), rank, world)
    learner.train(0, samples)
    extra = kit.save(learner, folder)
    after = learner.train(1, samples)
    weights = {n: t.clone() for n, t in learner.publish()}
    # narrowed before they are gathered, they are the same as narrowed after
    for name, narrow in learner.publish(dict.fromkeys(weights, torch.bfloat16)):
        assert torch.equal(narrow, weights[name].bfloat16()), name
    return extra, after.loss, {n: t.numpy() for n, t in weights.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_state_saved_by_any_number_of_ranks_goes_on_with_one(
    pair: Path, samples: list[Sample], tmp_path: Path, world: int
) -> None:
    extra, loss, expected = kit.on_ranks(world, tmp_path, rank_save, pair, samples, tmp_path / "saved")
    learner = kit.make_learner(pair, kit.config())
    learner.restore(tmp_path / "saved", extra)
    assert learner.version == 1
    report = learner.train(1, samples)
    assert report.loss == pytest.approx(loss, rel=1e-6)
    for name, tensor in learner.publish():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-4, atol=1e-5)


def test_saving_before_the_first_step_is_no_step(pair: Path, samples: list[Sample], tmp_path: Path) -> None:
    """AdamW corrects its moments by the step count: one too many changes every weight."""
    whole, saved, resumed = (kit.make_learner(pair, kit.config()) for _ in range(3))
    resumed.restore(tmp_path / "saved", kit.save(saved, tmp_path / "saved"))
    for learner in (whole, saved, resumed):
        learner.train(0, samples)
    expected = {name: tensor.clone() for name, tensor in whole.publish()}
    for learner in (saved, resumed):
        for name, tensor in learner.publish():
            assert torch.equal(tensor, expected[name]), name


def test_a_restored_learner_goes_by_the_recipe_of_today(
    pair: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """A checkpoint holds what AdamW has accumulated, not how to use it."""
    before = kit.make_learner(pair, kit.config())
    before.train(0, samples)
    extra = kit.save(before, tmp_path / "saved")
    after = kit.make_learner(pair, kit.config(betas=(0.8, 0.99), weight_decay=0.25))
    after.restore(tmp_path / "saved", extra)
    (group,) = after.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.99), 0.25)
    assert len(after.optimizer.state) == len(before.optimizer.state) > 0


def test_learning_rate_schedule() -> None:
    cfg = kit.config(warmup_steps=4, steps=14, decay="cosine", min_lr_ratio=0.2)
    factors = [lr_factor(cfg.learner, i) for i in range(14)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == pytest.approx([0.6 + 0.4 * math.cos(math.pi * i / 9) for i in range(10)])
    linear = [lr_factor(kit.changed(cfg, decay="linear").learner, i) for i in range(4, 14)]
    assert linear == pytest.approx([1 - 0.8 * i / 9 for i in range(10)])
    assert lr_factor(kit.changed(cfg, decay="constant").learner, 13) == 1.0


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 9, 10, 30])
@pytest.mark.parametrize("steps", [1, 2, 6, 10, 11])
def test_the_last_step_is_at_the_smallest_rate(decay: Any, warmup: int, steps: int) -> None:
    """Exactly, however short the run; the warm-up is just as steep, and adding steps changes no earlier
    rate.
    """
    cfg = kit.config(warmup_steps=warmup, steps=steps, decay=decay, min_lr_ratio=0.25)
    factors = [lr_factor(cfg.learner, i) for i in range(steps)]
    rising = [(i + 1) / warmup for i in range(min(warmup, steps))]
    if decay == "constant":
        assert factors == rising + [1.0] * (steps - len(rising))
        return
    assert factors[-1] == 0.25
    assert factors[: min(warmup, steps - 1)] == rising[: steps - 1]
    after = factors[warmup:]
    assert all(a > b for a, b in itertools.pairwise(after))
    assert len(after) < 2 or after[0] == 1.0
    longer = kit.changed(cfg, steps=steps + 7)
    assert lr_factor(longer.learner, steps + 6) == 0.25
    assert lr_factor(longer.learner, steps - 1) >= factors[-1] or steps <= warmup


def test_steps_out_of_order_are_refused(pair: Path, samples: list[Sample]) -> None:
    with pytest.raises(RuntimeError, match="asked for optimizer step 3"):
        kit.make_learner(pair, kit.config()).train(3, samples)


@pytest.mark.parametrize("packing", [True, False])
def test_kl_of_every_token_that_the_student_sampled(pair: Path, samples: list[Sample], packing: bool) -> None:
    """In the order of the samples, whatever the micro-batches; a training step keeps none."""
    learner = kit.make_learner(pair, kit.config(packing=packing))
    some = [replace(s, rollout=replace(s.rollout, loss_mask=s.rollout.loss_mask.copy())) for s in samples]
    some[1].rollout.loss_mask[1:-1:2] = False  # as where a tool wrote
    stats = learner.evaluate(some)
    assert [len(kls) for kls in stats.token_kl] == [int(s.rollout.loss_mask.sum()) for s in some]
    assert [float(kls.mean()) for kls in stats.token_kl] == pytest.approx(stats.kl.tolist(), rel=1e-5)
    alone = [learner.evaluate([s]).token_kl[0] for s in some]
    for together, one in zip(stats.token_kl, alone, strict=True):
        assert together == pytest.approx(one, rel=1e-3, abs=1e-6)
    assert list(learner.train(0, samples).stats.token_kl) == [None] * len(samples)


def test_kl_by_quarter_of_the_response(pair: Path, samples: list[Sample]) -> None:
    stats = kit.make_learner(pair, kit.config()).evaluate(samples)
    lengths = [s.rollout.response_length for s in samples]
    assert stats.kl_quartiles.shape == (len(samples), 4)
    whole = [i for i, n in enumerate(lengths) if n % 4 == 0]
    assert whole
    np.testing.assert_allclose(stats.kl_quartiles[whole].mean(-1), stats.kl[whole], rtol=1e-5)
    short = replace(
        samples[0].rollout, token_ids=samples[0].rollout.token_ids[: samples[0].rollout.prompt_length + 1]
    )
    one = replace(short, loss_mask=short.loss_mask[:1], logprobs=short.logprobs[:1])
    targets = replace(samples[0].targets, hidden=samples[0].targets.hidden[:1])
    (quarters,) = (
        kit.make_learner(pair, kit.config())
        .evaluate([replace(samples[0], rollout=one, targets=targets)])
        .kl_quartiles
    )
    assert np.isfinite(quarters).tolist() == [True, False, False, False]


def two_teachers(pair: Path, samples: list[Sample]) -> list[Sample]:
    """Every other sample is judged by the student's model, which is narrower than the teacher."""
    student = hf.load_model(str(pair / "student"), "m", torch.float32)
    targets = [
        TeacherTargets("hidden", hidden=torch.empty(s.rollout.response_length, 96), teacher=1)
        for s in samples
    ]
    TransformersTeacher(student, kit.CPU, 1, 4096, kit.VOCAB, 64).score([s.rollout for s in samples], targets)
    return [
        replace(s, targets=t) if i % 2 else s for i, (s, t) in enumerate(zip(samples, targets, strict=True))
    ]


def _measure(rank: int, world: int, pair: Path, samples: list[Sample]) -> np.ndarray:
    heads = [hf.load_head(str(pair / name), "m", torch.float32) for name in ("teacher", "student")]
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    learner = FsdpLearner(model, heads, kit.config(), kit.CPU, rank, world)
    measured = learner.evaluate(samples).kl
    np.testing.assert_allclose(learner.train(0, samples).stats.kl, measured, rtol=1e-4, atol=1e-7)
    return measured


@pytest.mark.parametrize("world", [1, 2])
def test_each_sample_is_measured_against_its_own_teacher(
    pair: Path, samples: list[Sample], tmp_path: Path, world: int
) -> None:
    mixed = two_teachers(pair, samples)
    alone = kit.make_learner(pair, kit.config()).evaluate(samples).kl
    found = kit.on_ranks(world, tmp_path, _measure, pair, mixed)
    np.testing.assert_allclose(found[::2], alone[::2], rtol=1e-4)
    assert (np.abs(found[1::2]) < 1e-6).all()
    assert (alone[1::2] > 1e-3).all()


def _score_unevenly(rank: int, world: int, pair: Path, samples: list[Sample], count: int) -> list[np.ndarray]:
    model = hf.load_model(str(pair / "teacher"), "m", torch.float32)
    teacher = TransformersTeacher(model, kit.CPU, world, 16, kit.VOCAB, 64)
    rollouts = [s.rollout for s in samples][:count]
    targets = [TeacherTargets("hidden", hidden=torch.empty(r.response_length, 128)) for r in rollouts]
    share = slice(rank, None, world)
    teacher.score(rollouts[share], targets[share])
    return [t.hidden.numpy() for t in targets[share] if t.hidden is not None]


@pytest.mark.parametrize("count", [1, 3])
def test_a_sharded_teacher_scores_uneven_shares(
    pair: Path, samples: list[Sample], tmp_path: Path, count: int
) -> None:
    """One rank has nothing to score, or fewer batches, but must still join in."""
    found = kit.on_ranks(2, tmp_path, _score_unevenly, pair, samples, count)
    for ours, sample in zip(found, samples[:count:2], strict=True):
        np.testing.assert_allclose(ours, sample.targets.hidden.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "offload", "fused"),
    [("cuda", False, True), ("cuda", True, True), ("cpu", True, True), ("cpu", False, False)],
)
def test_which_of_adamws_kernels_is_chosen(pair: Path, device: str, offload: bool, fused: bool) -> None:
    """The fused one for states on a device or offloaded from it; other runs on a CPU repeat older ones."""
    learner = kit.make_learner(pair, kit.config())
    (group,) = learner.optimizer.param_groups
    assert (group["fused"], group["foreach"]) == (False, True)
    learner.device, learner.config = torch.device(device), kit.config(offload=offload)
    assert learner._kernel() == {"fused": fused, "foreach": not fused}
    torch.optim.AdamW(learner.student.parameters(), **learner._kernel())  # it takes these together
