"""Ideas for long lags that were tried, as changes of one learner: "@NAME=VALUE" among a cell's `extra`.

What pays becomes a key of the recipe; docs/staleness.md tells what became of each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fopd_cli.losses import terms
from fopd_cli.losses.divergence import policy_gradient
from fopd_cli.samples import StepReport

PLAIN = policy_gradient


def install(learner: Any, chosen: Mapping[str, float]) -> None:
    """Change this learner, and no other."""
    terms.policy_gradient = PLAIN
    for name, value in chosen.items():
        VARIANTS[name](learner, value)


def after_each_step(learner: Any, do: Callable[[StepReport], None]) -> None:
    train = learner.train

    def trained(step: int, samples: Sequence[Any]) -> StepReport:
        report: StepReport = train(step, samples)
        do(report)
        return report

    learner.train = trained


def lagged_drift(report: StepReport) -> float | None:
    found = report.stats.drift_roll[report.stats.lag > 0]
    return float(found.mean()) if len(found) else None


def dual(learner: Any, target: float) -> None:
    """lambda as a dual variable that holds D_roll at `target` nats: it grows by up to a tenth a step while
    D_roll is over it, and falls likewise.
    """

    def update(report: StepReport) -> None:
        drift = lagged_drift(report)
        if drift is not None:
            factor = math.exp(0.1 * max(-1.0, min(1.0, drift / target - 1)))
            learner.config = replace(
                learner.config, anchor=min(200.0, max(1.0, learner.config.anchor * factor))
            )

    after_each_step(learner, update)


def newest(learner: Any, memory: float) -> None:
    """Anchor to the mean of the student's last `memory` versions or so, not to the one that sampled."""
    mean = copy.deepcopy(learner.student).requires_grad_(False)
    forward = learner._forward

    @torch.no_grad()
    def follow(_: StepReport) -> None:
        for ours, theirs in zip(mean.parameters(), learner.student.parameters(), strict=True):
            ours.lerp_(theirs, 1 / memory)

    def anchored(samples: Any, indices: list[int], batch: Any) -> Any:
        with torch.no_grad():
            hidden = batch.tokens.hidden(mean.lm).index_select(0, batch.index)
            logits = mean.rule.head(mean.lm).first(learner.config.vocab).logits(hidden)
            batch.at.behaviour_topk = torch.log_softmax(logits, -1).gather(-1, batch.at.behaviour_topk_ids)
        return forward(samples, indices, batch)

    learner._forward = anchored
    after_each_step(learner, follow)


def trust(learner: Any, width: float) -> None:
    """Anchor and the token's trust region together."""
    learner.config = replace(learner.config, loss=replace(learner.config.loss, trust=width))


def clip(learner: Any, limit: float) -> None:
    """Advantages within `limit` nats."""

    def clipped(student: Tensor, teacher: Tensor, behaviour: Tensor, *args: Any) -> Tensor:
        near = behaviour + (teacher - behaviour).clamp(-limit, limit)
        return PLAIN(student, near, behaviour, *args)

    terms.policy_gradient = clipped


def baseline(learner: Any, share: float) -> None:
    """Advantages less a `share` of their mean over the chunk."""

    def centred(student: Tensor, teacher: Tensor, behaviour: Tensor, *args: Any) -> Tensor:
        return PLAIN(student, teacher - share * (teacher - behaviour).mean(), behaviour, *args)

    terms.policy_gradient = centred


def slow(learner: Any, target: float) -> None:
    """The learning rate times target/D_roll of the step before while D_roll is over `target`."""
    lr = learner.config.learner.lr

    def update(report: StepReport) -> None:
        drift = lagged_drift(report) or 0.0
        scaled = lr * min(1.0, target / max(drift, 1e-9))
        learner.config = replace(
            learner.config, learner=learner.config.learner.model_copy(update={"lr": scaled})
        )

    after_each_step(learner, update)


VARIANTS: dict[str, Callable[[Any, float], None]] = {
    f.__name__: f for f in (dual, newest, trust, clip, baseline, slow)
}
