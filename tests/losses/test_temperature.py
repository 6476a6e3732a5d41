"""Where each support settles when the student samples at a temperature other than 1, in exact expectation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SLOW, TINY, Fopd, metrics, small_recipe
from torch import Tensor

from fopd_cli.losses.terms import LossSpec, Positions, terms_of

VOCAB = 6
T = 0.6
TEACHER = torch.tensor([2.0, 1.0, 0.3, -0.5, -1.0, -2.5], dtype=torch.float64)


def gradient(spec: LossSpec, student: Tensor) -> Tensor:
    """Of the loss by the student's logits, in expectation over tokens and draws from the student at T."""
    acting = torch.log_softmax(student / T, -1)
    everything = torch.arange(VOCAB)
    logits = student.clone().requires_grad_()
    rows = logits.expand(VOCAB, -1)  # one position for each token that may have been sampled
    top = torch.log_softmax(TEACHER, -1).topk(3)
    at = Positions(
        everything,
        acting,
        teacher_topk=top.values.expand(VOCAB, -1),
        teacher_topk_ids=top.indices.expand(VOCAB, -1),
    )
    if spec.support == "mc":  # the second draw is as the first
        at.draw_ids, at.draw_behaviour = everything[:, None], acting[:, None]
    loss, *_ = terms_of(spec, at, rows, TEACHER.expand(VOCAB, -1))
    (found,) = torch.autograd.grad((acting.exp() * loss).sum(), logits)
    return found


FULL = LossSpec("reverse_kl", "full", sampling_temperature=T)
SAMPLED = replace(FULL, support="sampled")
MC = replace(FULL, support="mc")


@pytest.mark.parametrize(
    ("spec", "settles"),
    [
        (FULL, TEACHER),  # pi_1 = p_1
        (replace(FULL, temperature=2.0), TEACHER),  # and at any temperature of the loss
        (replace(FULL, kind="forward_kl", temperature=0.5), TEACHER),
        (replace(FULL, support="topk"), TEACHER),
        (SAMPLED, T * TEACHER),  # pi_T = p_1: at temperature 1 it is p_1 to the power of T
        (MC, T * TEACHER),
        (replace(SAMPLED, teacher_temperature=T), TEACHER),  # pi_T = p_T, hence pi_1 = p_1
        (replace(MC, teacher_temperature=T), TEACHER),
    ],
)
def test_where_a_support_settles(spec: LossSpec, settles: Tensor) -> None:
    other = T * TEACHER if settles is TEACHER else TEACHER
    assert gradient(spec, settles).abs().max() < 1e-7
    assert gradient(spec, other).abs().max() > 1e-3
    assert gradient(spec, settles + 3.0).abs().max() < 1e-7, "logits mean the same with a constant added"


@SLOW
def test_it_is_said_before_a_run(fopd: Fopd) -> None:
    recipe = small_recipe(
        TINY, loss={"support": "sampled"}, sampler={"temperature": 0.3, "max_new_tokens": 10}
    )
    out = fopd("doctor", fopd.recipe(recipe), "--no-sanity", code=2).out
    assert "compares the student at 0.3 with the teacher at 1" in out
    assert "teacher to the power of 0.3" in out
    out = fopd("doctor", fopd.recipe(recipe), "--no-sanity", "--set", "loss.support=topk", code=2).out
    assert "loss.support topk compares both models at temperature 1" in out
    for cure in ("loss.teacher_temperature=sampler", "loss.support=full", "sampler.temperature=1"):
        assert "no findings" in fopd("doctor", fopd.recipe(recipe), "--no-sanity", "--set", cure).out


@SLOW
def test_a_teacher_at_the_students_temperature(fopd: Fopd) -> None:
    """In a run: a teacher that is the student says nothing, and without it it would."""
    student = str(TINY / "student")
    recipe = small_recipe(
        TINY,
        teacher={"model": student, "batch_samples": 4},
        sampler={"temperature": 0.3, "max_new_tokens": 10},
        loss={"support": "sampled", "teacher_temperature": "sampler"},
        freshness={"policy": "async"},
        learner={"steps": 1, "lr": 1e-9},
    )
    kl = {}
    for name, key in (("same", "sampler"), ("other", "one")):
        run = fopd.run(recipe, name, "--set", f"loss.teacher_temperature={key}")
        kl[name] = next(abs(r["kl"]) for r in metrics(run) if r["kind"] == "step")
    assert kl["same"] < 1e-4
    assert kl["other"] > 1e-2
