"""One tiny model through sampler, teacher, learner and publication, each against plain transformers on one
sequence at a time.

`verdict` is what docs/models.md says of an architecture: right, or refused in one line before workers start.
Anything else is an `AssertionError`: numbers that are wrong have no cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import learner_kit as kit
import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf, support
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.errors import UserError
from fopd_cli.samples import Request, Rollout, Sample, SamplingParams, TeacherTargets

# Prompt and response lengths: of several lengths and of one, ending at different times; past windows, chunks,
# rope switches.
LENGTHS = ((3, 4), (7, 9), (7, 14), (10, 6), (18, 12), (20, 3))
SHARED = 17  # tokens that the last two begin with, which packed rows hold once on a CPU
LONGEST = 40
UPDATE_AT = 5  # tokens: then other weights are published
LOGPROB, GRADIENT = 1e-5, 1e-4
# transformers' own two ways of computing these, at once and token by token, differ by 1e-4, in float64 just
# as in float32.
TWO_WAYS = {"zamba2": 2e-4}


@dataclass(frozen=True)
class Verdict:
    """A row of the table. Empty reasons mean right."""

    refused: str = ""  # why it can be neither student nor teacher
    packing: str = ""  # why its samples cannot lie in one row
    lora: str = ""
    decoding: str = ""  # how the transformers sampler decodes it


def verdict(name: str, folder: Path) -> Verdict:
    """Of the architecture of this name; models are written to `folder`."""
    config = architectures.ARCHITECTURES[name]()
    if (refused := support.refusal(config)) is not None:
        return Verdict(refused)
    for number, role in enumerate(("student", "teacher", "other")):
        architectures.make(config, hf._auto(config), number).save_pretrained(folder / role)
    try:
        load(folder / "student")
    except UserError as error:
        return Verdict(_reason(error))
    samples = sampled(folder, TWO_WAYS.get(name, LOGPROB))
    packings = [False]
    packing = support.packing_refusal(config) or ""
    if support.keeps_state(config) and not any("compress" in kind for kind in support.layer_types(config)):
        _says_so(folder)  # (what compresses does so past the length of these samples)
    if not packing:
        packings.append(True)
    for packed in packings:
        scored(folder, samples, packed)
    for packed in packings:
        learnt(folder, samples, packed)
    return Verdict("", packing, adapted(folder), _decoding(config, folder))


def load(folder: Path) -> Any:
    return hf.load_model(str(folder), "student.model", torch.float32)


def plain(folder: Path) -> Any:
    """As anyone would load it; where that leaves out a soft cap, with the architecture's own attention."""
    config = hf.load_config(str(folder), "m")
    capped = getattr(hf.text_config(config), "attn_logit_softcapping", None) is not None
    how = {"attn_implementation": "eager"} if capped else {}
    return hf._auto(config).from_pretrained(folder, dtype=torch.float32, **how).eval()


def logits(model: Any, ids: np.ndarray) -> Tensor:
    """`(tokens, vocab)` of one sequence. Dynamic NTK remembers the longest that it has seen, so a short one
    is shown first.
    """
    if rope.by_length(model.config):
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4]]), use_cache=False)
    out: Tensor = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
    return out


def sampled(folder: Path, tolerance: float) -> list[Sample]:
    """Rollouts of the student, with new weights in the middle; their log-probs are those of plain
    transformers.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    sampler = TransformersSampler(load(folder / "student"), hf.TokenRules(frozenset({-1}), 0), kit.CPU, 4)
    before = {name: tensor.clone() for name, tensor in lora.merged(sampler.model)}
    after = dict(lora.merged(load(folder / "other")))
    prompts = [rng.integers(3, 58, size=n).astype(np.int32) for n, _ in LENGTHS]
    prompts[-1][:SHARED] = prompts[-2][:SHARED]
    sampler.submit(
        [
            Request(i, p, 7 + i, SamplingParams(max_new_tokens=n))
            for i, (p, (_, n)) in enumerate(zip(prompts, LENGTHS, strict=True))
        ]
    )
    rollouts: list[Rollout] = []
    for step in range(200):
        if step == UPDATE_AT:
            sampler.load(1, iter(after.items()))
        rollouts += sampler.step()
        if not sampler.busy:
            break
    assert len(rollouts) == len(LENGTHS)
    rollouts.sort(key=lambda r: r.key)
    models = {0: plain(folder / "student"), 1: plain(folder / "other")}
    for rollout in rollouts:
        for version, start, stop in rollout.spans:
            expected = response_logprobs(models[version], rollout, stop)
            np.testing.assert_allclose(
                rollout.logprobs[start:stop],
                expected[start:],
                rtol=tolerance,
                atol=tolerance,
                err_msg="sampler",
            )
    # Those of one whole version for what follows.
    sampler.load(2, iter(before.items()))
    again = [response_logprobs(models[0], r, r.response_length).astype(np.float32) for r in rollouts]
    return [
        Sample(
            kit.replace(r, logprobs=found, spans=[(0, 0, r.response_length)]), TeacherTargets("hidden"), lag=0
        )
        for r, found in zip(rollouts, again, strict=True)
    ]


@torch.no_grad()
def response_logprobs(model: Any, rollout: Rollout, stop: int) -> np.ndarray:
    """log pi of the first `stop` response tokens, each from the sequence up to it."""
    ids, prompt = rollout.token_ids, rollout.prompt_length
    if rope.by_length(model.config):  # a longer sequence has other factors
        rows = torch.stack([logits(model, ids[: prompt + i])[-1] for i in range(stop)])
    else:
        rows = logits(model, ids[: prompt + stop])[prompt - 1 : -1]
    target = torch.from_numpy(rollout.response_ids[:stop]).long()[:, None]
    return torch.log_softmax(rows.double(), -1).gather(-1, target)[:, 0].numpy()


@torch.no_grad()
def scored(folder: Path, samples: list[Sample], packed: bool) -> None:
    """The teacher's hidden states times its head are plain transformers' logits; they stay in the samples."""
    teacher = TransformersTeacher(
        load(folder / "teacher"), kit.CPU, 1, 64, architectures.VOCAB, LONGEST, packed
    )
    head = teacher.head()
    width = hf.hidden_width(teacher.model.lm.config)
    assert head.weight.shape[1] == width
    rollouts = [s.rollout for s in samples]
    targets = [TeacherTargets("hidden", hidden=torch.empty(r.response_length, width)) for r in rollouts]
    teacher.score(rollouts, targets)
    judge = plain(folder / "teacher")
    for sample, target in zip(samples, targets, strict=True):
        r = sample.rollout
        expected = torch.log_softmax(logits(judge, r.token_ids)[r.prompt_length - 1 : -1], -1)
        assert target.hidden is not None
        found = torch.log_softmax(head.logits(target.hidden), -1)
        torch.testing.assert_close(
            found, expected, rtol=0, atol=2 * LOGPROB, msg=lambda m: f"teacher, packed {packed}: {m}"
        )
        sample.targets = target


def learnt(folder: Path, samples: list[Sample], packed: bool) -> None:
    """The learner's loss and gradients are those of plain autograd, sample by sample, from full logits."""
    total, expected = reference(folder, samples)
    cfg = kit.config(packing=packed, vocab=architectures.VOCAB, longest=LONGEST, micro_tokens=64)
    student = load(folder / "student")
    hf.freeze_unused(student)
    head = hf.load_head(str(folder / "teacher"), "m", torch.float32)
    learner = FsdpLearner(student, [head], cfg, kit.CPU, 0, 1)
    report = learner.train(0, samples)
    assert abs(report.loss - total) < 1e-4 * max(1.0, abs(total)), (
        f"loss, packed {packed}: {report.loss} for {total}"
    )
    scale = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, parameter in learner.student.lm.named_parameters():
        wanted = expected.get(name)
        if wanted is None:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient"
            continue
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        off = float((found - wanted).norm())
        # Relative to the parameter's own gradient; one that is rounding alone, to the whole one.
        assert off <= GRADIENT * max(float(wanted.norm()), 1e-2 * scale), (
            f"gradient of {name}, packed {packed}: {off:.1e}"
        )


def reference(folder: Path, samples: list[Sample]) -> tuple[float, dict[str, Tensor]]:
    """Mean over samples of the mean over positions of KL(student || teacher), and its gradients."""
    student, judge = plain(folder / "student"), plain(folder / "teacher")
    total = torch.zeros(())
    for sample in samples:
        r = sample.rollout
        at = slice(r.prompt_length - 1, -1)
        with torch.no_grad():
            p = torch.log_softmax(logits(judge, r.token_ids)[at], -1)
        pi = torch.log_softmax(logits(student, r.token_ids)[at], -1)
        total = total + (pi.exp() * (pi - p)).sum(-1).mean() / len(samples)
    total.backward()
    return total.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@torch.no_grad()
def adapted(folder: Path) -> str:
    """LoRA: published weights compute what base and adapters compute. Returns why it is refused, if it is."""
    student = load(folder / "student")
    try:
        lora.add_adapters(student, 2, 4.0, "all-linear", 0, torch.float32)
    except UserError as error:
        return _reason(error)
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged, ids = plain(folder / "student"), np.arange(3, 30)
    own, untouched = merged.state_dict(keep_vars=True), logits(merged, ids)
    for name, tensor in lora.merged(student):
        own[name].copy_(tensor)
    found = logits(merged, ids)
    torch.testing.assert_close(found, logits(student, ids), rtol=1e-4, atol=1e-4, msg=lambda m: f"LoRA: {m}")
    assert not torch.allclose(found, untouched, atol=1e-2), "LoRA changes nothing"
    return ""


def _says_so(folder: Path) -> None:
    """What is refused beforehand would be wrong: the probe on the model itself agrees, wherever it can run at
    all.
    """
    try:
        TransformersTeacher(load(folder / "student"), kit.CPU, 1, 64, architectures.VOCAB, LONGEST, True)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return
    raise AssertionError("packing is refused without need")


def _decoding(config: Any, folder: Path) -> str:
    sampler = TransformersSampler(load(folder / "student"), hf.TokenRules(frozenset(), 0), kit.CPU, 4)
    sampler.submit([Request(0, np.arange(3, 8, dtype=np.int32), 0, SamplingParams(max_new_tokens=2))])
    sampler.step()
    if sampler._cache is None:
        return "no cache"
    return "one length" if sampler._one_length else "batched"


def _reason(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text
    return text.partition(": ")[2]


def every(names: list[str], folder: Path, tell: Callable[[str, Verdict | str], None]) -> None:
    """Verdicts of several; what is wrong is told as text."""
    for name in names:
        try:
            tell(name, verdict(name, folder / name.replace(" ", "-")))
        except AssertionError as error:
            tell(name, str(error)[:300])
