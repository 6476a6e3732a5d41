"""The transformers engines on tiny real models: they compute what the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.transformers.sampler import TransformersSampler, behaviour_logprobs, inverse_transform
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.samples import Request, Rollout, SamplingParams, TargetSpec, TeacherTargets

CPU = torch.device("cpu")


@pytest.fixture(params=["pair", "llama_pair"])
def student(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param) / "student")


def requests(count: int, params: SamplingParams, seed: int = 0) -> list[Request]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [
        Request(
            i, rng.integers(4, 200, size=rng.integers(1, 9)).astype(np.int32), seed=100 + i, params=params
        )
        for i in range(count)
    ]


def drain(sampler: Any) -> dict[int, Rollout]:
    out = {}
    while sampler.busy:
        for rollout in sampler.step():
            out[rollout.key] = rollout
    return out


def model_logprobs(model: Any, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    """log pi(y) of every response token, from one plain forward pass over the unpadded sequence."""
    with torch.no_grad():
        logits = model(torch.from_numpy(rollout.token_ids).long()[None]).logits[0].double() / temperature
    predicted = torch.log_softmax(logits, -1)[rollout.prompt_length - 1 : -1]
    return predicted.gather(-1, torch.from_numpy(rollout.response_ids).long()[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_are_the_models(student: str, temperature: float) -> None:
    sampler = on_weights(student, torch.float32, CPU, concurrency=4)
    sampler.submit(requests(10, SamplingParams(temperature=temperature, max_new_tokens=12)))
    rollouts = drain(sampler)
    model = hf.load_model(student, "m", torch.float32)
    assert len(rollouts) == 10
    for rollout in rollouts.values():
        np.testing.assert_allclose(rollout.logprobs, model_logprobs(model, rollout, temperature), atol=2e-5)
        assert rollout.finish == ("stop" if rollout.response_ids[-1] == 1 else "length")
        assert rollout.spans == [(0, 0, rollout.response_length)]


def test_a_rollout_does_not_depend_on_its_neighbours(student: str) -> None:
    params = SamplingParams(max_new_tokens=8)
    together, alone = (on_weights(student, torch.float32, CPU, concurrency=n) for n in (8, 1))
    for sampler in (together, alone):
        sampler.submit(requests(8, params))
    first, second = drain(together), drain(alone)
    for key, rollout in first.items():
        np.testing.assert_array_equal(rollout.token_ids, second[key].token_ids)
        np.testing.assert_allclose(rollout.logprobs, second[key].logprobs, atol=1e-5)


def other_weights(student: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model = hf.load_model(student, "m", torch.float32)
    return {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items() if k != "lm_head.weight"}


def test_new_weights_in_the_middle_open_a_span_and_are_whole(student: str) -> None:
    """Tokens before and after the update have the log-probs of the old and of the new model, context
    included.
    """
    sampler = on_weights(student, torch.float32, CPU, concurrency=4)
    sampler.submit(requests(4, SamplingParams(max_new_tokens=12)))
    for _ in range(5):
        sampler.step()
    weights = other_weights(student)
    sampler.load(3, iter(weights.items()))
    rollouts = drain(sampler)
    old, new = (hf.load_model(student, "m", torch.float32) for _ in range(2))
    new.load_state_dict(weights, strict=False)
    new.tie_weights()
    spanning = [r for r in rollouts.values() if len(r.spans) == 2]
    assert spanning
    for rollout in spanning:
        n = rollout.response_length
        assert rollout.spans == [(0, 0, 5), (3, 5, n)]
        assert rollout.oldest_version == 0
        np.testing.assert_allclose(rollout.logprobs[:5], model_logprobs(old, rollout)[:5], atol=2e-5)
        np.testing.assert_allclose(rollout.logprobs[5:], model_logprobs(new, rollout)[5:], atol=2e-5)


def test_abort_forgets_everything(student: str) -> None:
    sampler = on_weights(student, torch.float32, CPU, concurrency=2)
    sampler.submit(requests(5, SamplingParams(max_new_tokens=50)))
    sampler.step()
    sampler.abort()
    assert not sampler.busy
    assert sampler.step() == []


def test_topk_and_full_behaviour_distributions(student: str) -> None:
    for keep, width in ((5, 5), (-1, 260)):
        sampler = on_weights(student, torch.float32, CPU, concurrency=4)
        sampler.submit(requests(3, SamplingParams(max_new_tokens=6, keep_topk=keep)))
        for rollout in drain(sampler).values():
            assert rollout.topk_logprobs is not None
            assert rollout.topk_logprobs.shape == (rollout.response_length, width)
            if keep < 0:
                chosen = rollout.topk_logprobs[np.arange(rollout.response_length), rollout.response_ids]
                np.testing.assert_allclose(chosen, rollout.logprobs, atol=1e-6)
                np.testing.assert_allclose(np.exp(rollout.topk_logprobs).sum(-1), 1, atol=1e-5)


def test_inverse_transform_samples_the_distribution() -> None:
    logprobs = torch.log(torch.tensor([[0.1, 0.0, 0.6, 0.3]])).expand(100_000, 4)
    uniforms = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(inverse_transform(logprobs, uniforms).flatten(), minlength=4) / 200_000
    np.testing.assert_allclose(counts.numpy(), [0.1, 0.0, 0.6, 0.3], atol=5e-3)
    assert inverse_transform(logprobs[:1], torch.tensor([[0.0]])).item() == 0
    assert inverse_transform(logprobs[:1], torch.tensor([[1 - 1e-16]], dtype=torch.float64)).item() == 3


def test_top_p_and_greedy_are_renormalised() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 3))
    params = [SamplingParams(top_p=0.7), SamplingParams(temperature=0.0), SamplingParams(top_p=0.01)]
    found = behaviour_logprobs(logits, params).exp().numpy()
    np.testing.assert_allclose(found, [[0.625, 0.375, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], atol=1e-6)


def test_draws_beside_the_response(student: str) -> None:
    """They leave the response unchanged, follow the policy's distribution, and have its log-probs."""
    rollouts = []
    for draws in (1, 65):
        sampler = on_weights(student, torch.float32, CPU, concurrency=8)
        sampler.submit(requests(8, SamplingParams(max_new_tokens=8, keep_topk=-1, draws=draws)))
        rollouts.append(drain(sampler))
    matches = expected = 0.0
    for key, rollout in rollouts[1].items():
        np.testing.assert_array_equal(rollout.token_ids, rollouts[0][key].token_ids)
        assert rollouts[0][key].draw_ids is None
        assert rollout.draw_ids is not None
        assert rollout.topk_logprobs is not None
        assert rollout.draw_ids.shape == (rollout.response_length, 64)
        full = np.take_along_axis(rollout.topk_logprobs, rollout.draw_ids.astype(int), -1)
        np.testing.assert_array_equal(rollout.draw_logprobs, full)
        likeliest = rollout.topk_logprobs.argmax(-1)
        matches += float((rollout.draw_ids == likeliest[:, None]).sum())
        expected += float(np.exp(rollout.topk_logprobs.max(-1)).sum() * 64)
    assert abs(matches - expected) < 5 * expected**0.5


def targets_for(kind: Any, width: int, rollouts: list[Rollout]) -> list[TeacherTargets]:
    spec = TargetSpec(kind, width, torch.float32)
    return [
        TeacherTargets(
            kind, **{n: torch.zeros(shape, dtype=d) for n, d, shape in spec.fields(r.response_length)}
        )
        for r in rollouts
    ]


def test_teacher_targets_are_the_models(student: str, request: pytest.FixtureRequest) -> None:
    sampler = on_weights(student, torch.float32, CPU, concurrency=8)
    sampler.submit(requests(7, SamplingParams(max_new_tokens=9)))
    rollouts = list(drain(sampler).values())
    path = str(Path(student).parent / "teacher")
    model = hf.load_model(path, "m", torch.float32)
    teacher = TransformersTeacher(
        hf.load_model(path, "m", torch.float32), CPU, 1, micro_tokens=40, vocab=260, longest=64
    )
    head = hf.load_head(path, "m", torch.float32)
    for kind, width in (("hidden", 128), ("topk", 6), ("sampled", 1)):
        targets = targets_for(kind, width, rollouts)
        teacher.score(rollouts, targets)
        for rollout, target in zip(rollouts, targets, strict=True):
            expected = model_logprobs(model, rollout)
            if target.hidden is not None:
                logprobs = torch.log_softmax(head.logits(target.hidden), -1)
                found = logprobs.gather(-1, torch.from_numpy(rollout.response_ids).long()[:, None])[:, 0]
                np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
                continue
            assert target.logprobs is not None
            np.testing.assert_allclose(target.logprobs.numpy(), expected, atol=2e-5)
            if target.topk_logprobs is not None and target.topk_ids is not None:
                assert (target.topk_logprobs.diff(dim=-1) <= 0).all()
                for row, ids, y, logp in zip(
                    target.topk_logprobs, target.topk_ids, rollout.response_ids, expected, strict=True
                ):
                    if y in ids:
                        assert row[ids.tolist().index(y)].item() == pytest.approx(logp, abs=2e-5)


@pytest.mark.parametrize("keep", [4, -1])
def test_the_students_likeliest_tokens_join_the_teachers(student: str, keep: int) -> None:
    """The first of the k classes are the student's own, the others the teacher's likeliest among the rest."""
    sampler = on_weights(student, torch.float32, CPU, 3)
    sampler.submit(requests(3, SamplingParams(max_new_tokens=6, keep_topk=keep)))
    rollouts = list(drain(sampler).values())
    model, judge = (
        hf.load_model(str(Path(student).parent / "teacher"), "m", torch.float32) for _ in range(2)
    )
    targets = targets_for("topk", 7, rollouts)
    TransformersTeacher(judge, CPU, 1, 64, 260, 64, student_k=3).score(rollouts, targets)
    for rollout, target in zip(rollouts, targets, strict=True):
        assert rollout.topk_logprobs is not None
        with torch.no_grad():
            logits = model(torch.from_numpy(rollout.token_ids).long()[None]).logits[
                0, rollout.prompt_length - 1 : -1
            ]
        teacher = torch.log_softmax(logits[:, :260], -1)
        assert target.topk_ids is not None
        assert target.topk_logprobs is not None
        ids = target.topk_ids.long()
        torch.testing.assert_close(target.topk_logprobs, teacher.gather(-1, ids), rtol=1e-4, atol=1e-5)
        for row, h in zip(ids.tolist(), range(rollout.response_length), strict=True):
            order = (-rollout.topk_logprobs[h]).argsort(kind="stable")[:3]
            own = order if rollout.topk_ids is None else rollout.topk_ids[h][order]
            assert row[:3] == own.tolist()
            others = [t for t in teacher[h].argsort(descending=True).tolist() if t not in row[:3]]
            assert row[3:] == others[:4]


def test_the_published_layout_is_what_models_load(student: str) -> None:
    """Names, shapes and tying: the layout made without weights matches the real model."""
    layout = hf.weight_layout(hf.load_config(student, "m"), torch.float32)
    model = hf.load_model(student, "m", torch.float32)
    sampler = TransformersSampler(model, hf.TokenRules(frozenset({1}), 0), CPU, 1)
    sampler.load(1, ((name, torch.full(shape, 0.5)) for name, shape, _ in layout))
    assert all((p == 0.5).all() for p in model.parameters())
