"""D_sup, the drift of supervision by a frozen teacher whose context changes.

Where contexts may change, a teacher records two things beside its targets: which positions still have a
context, and after a re-execution how far today's labels are from the cached ones.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fopd_cli.freshness import drift
from fopd_cli.samples import Rollout, TeacherTargets

CHUNK_BYTES = 64 << 20  # of one float32 [positions, vocab] or [positions, k, k] tensor


class Head(Protocol):
    """What makes logits `(n, vocab)` from hidden states `(n, width)`."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def vocab(self) -> int: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def first_labels(rollout: Rollout, targets: TeacherTargets) -> None:
    """Nothing has drifted yet."""
    if targets.drift is not None and targets.aligned is not None:
        targets.drift.zero_()
        targets.aligned.copy_(torch.from_numpy(rollout.judged.positions >= 0))


def blank(targets: TeacherTargets) -> TeacherTargets:
    """Blank targets of the same shape for what the teacher says today."""
    tensors = {f.name: getattr(targets, f.name) for f in fields(targets)}
    own: dict[str, Any] = {name: torch.zeros_like(t) for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(targets, **own)


def note_drift(rollout: Rollout, targets: TeacherTargets, today: TeacherTargets, head: Head | None) -> None:
    """Record KL(p(.|now) || p(.|labelled)) beside the existing labels at every aligned, loss-bearing
    position.

    From hidden states and the teacher's `head` it is exact; from log-probs it is over the classes that both
    have.
    """
    assert targets.drift is not None
    assert targets.aligned is not None
    aligned = torch.from_numpy(rollout.judged.positions >= 0)
    targets.aligned.copy_(aligned)
    targets.drift.zero_()
    rows = torch.nonzero(aligned & torch.from_numpy(rollout.loss_mask)).flatten()
    width = max(1, 4 * (head.vocab if head is not None else _classes(targets) ** 2))
    for part in rows.split(max(1, CHUNK_BYTES // width)):
        targets.drift[part] = _drift(targets, today, part, head).float().cpu()


def take_over(targets: TeacherTargets, today: TeacherTargets) -> None:
    """Replace the existing labels with today's; drift and alignment stay."""
    for f in fields(targets):
        label = getattr(targets, f.name)
        if isinstance(label, Tensor) and f.name not in ("drift", "aligned"):
            label.copy_(getattr(today, f.name))


def _classes(targets: TeacherTargets) -> int:
    return 1 if targets.topk_ids is None else targets.topk_ids.shape[-1]


def _drift(old: TeacherTargets, new: TeacherTargets, rows: Tensor, head: Head | None) -> Tensor:
    if old.hidden is not None and new.hidden is not None:
        assert head is not None
        both = (head.logits(t[rows].to(head.weight.device)) for t in (new.hidden, old.hidden))
        now, then = (torch.log_softmax(logits, -1) for logits in both)
        return drift.exact(now, then)
    if old.topk_logprobs is not None and new.topk_logprobs is not None:
        assert old.topk_ids is not None
        assert new.topk_ids is not None
        return drift.overlap(
            new.topk_logprobs[rows], new.topk_ids[rows], old.topk_logprobs[rows], old.topk_ids[rows]
        )
    assert old.logprobs is not None
    assert new.logprobs is not None
    # the sampled token, and all others as one
    return drift.topk(new.logprobs[rows, None], old.logprobs[rows, None])
