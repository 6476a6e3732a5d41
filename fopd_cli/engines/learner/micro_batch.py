"""Some samples as the learner's forward takes them: token ids, and one row for each position that bears loss.

Positions that bear none (prompts, tool output, padding) go through the model, where others attend to them,
but no further: neither their logits nor their teacher's are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.tokens.token_batch import TokenBatch
from fopd_cli.losses.terms import SOURCES, Positions
from fopd_cli.samples import Rollout, Sample, TeacherTargets

HOST = torch.device("cpu")
SUPERVISION = {  # field of `MicroBatch` -> field of `TeacherTargets`, dtype
    "drift_sup": ("drift", torch.float32),
    "current": ("aligned", torch.bool),
}


@dataclass
class MicroBatch:
    """`n` samples with `N` loss-bearing positions between them; a sample without any has one, of weight 0."""

    tokens: TokenBatch
    index: Tensor  # int64 (N,): the place in `tokens` whose hidden state predicts the position
    at: Positions
    sample: Tensor  # int64 (N,)
    by_student: Tensor  # bool (N,): the student sampled its token
    current: Tensor  # bool (N,): in the teacher's current context
    drift_sup: Tensor  # float32 (N,): KL of the teacher's label now against the first one
    quarter: Tensor  # int64 (N,): of the sample's loss-bearing positions, 0 to 3
    lag: Tensor  # int64 (n,)
    lengths: Tensor  # float32 (n,): sampled positions

    @classmethod
    def of(
        cls, samples: Sequence[Sample], packed: bool, shared: bool = True, pinned: bool = False
    ) -> MicroBatch:
        """All on the host, targets in page-locked memory if `pinned`; `packed` and `shared` as in
        `TokenBatch`.
        """
        rollouts = [s.rollout for s in samples]
        rows = [
            np.flatnonzero(r.loss_mask) if r.loss_mask.any() else np.zeros(1, dtype=np.int64)
            for r in rollouts
        ]
        counts = np.array([len(own) for own in rows])
        tokens = TokenBatch.of([r.token_ids for r in rollouts], packed, HOST, shared)
        index = [
            p[r.prompt_length - 1 + own] for p, r, own in zip(tokens.places, rollouts, rows, strict=True)
        ]
        targets = [s.targets for s in samples]
        found = {}
        for name, source in SOURCES.items():
            if source.of == "rollout":
                found[name] = _of_rollouts(rollouts, rows, source.name, source.dtype)
            else:
                found[name] = _of_targets(targets, rows, source.name, source.dtype, pinned)

        def array(parts: Sequence[np.ndarray] | np.ndarray) -> Tensor:
            return torch.from_numpy(parts if isinstance(parts, np.ndarray) else np.concatenate(parts))

        positions: dict[str, Any] = found
        sampled = array([r.loss_mask[own] for r, own in zip(rollouts, rows, strict=True)])
        labels = {
            name: _of_targets(targets, rows, label, dtype, pinned)
            for name, (label, dtype) in SUPERVISION.items()
        }
        current, drift_sup = labels["current"], labels["drift_sup"]
        return cls(
            tokens=tokens,
            index=array(index),
            at=Positions(**positions),
            sample=array(np.repeat(np.arange(len(samples)), counts)),
            by_student=sampled,
            current=torch.ones_like(sampled) if current is None else current,
            drift_sup=torch.zeros(len(sampled)) if drift_sup is None else drift_sup,
            quarter=array([4 * np.arange(n) // n for n in counts]),
            lag=array(np.array([s.lag for s in samples])),
            lengths=array(np.array([r.loss_mask.sum() for r in rollouts], dtype=np.float32)),
        )


def _of_rollouts(
    rollouts: Sequence[Rollout], rows: Sequence[np.ndarray], name: str, dtype: torch.dtype | None
) -> Tensor | None:
    arrays = [getattr(r, name) for r in rollouts]
    if any(a is None for a in arrays):
        return None
    kept = torch.from_numpy(np.concatenate([a[own] for a, own in zip(arrays, rows, strict=True)]))
    return kept.to(dtype or kept.dtype)


def _of_targets(
    targets: Sequence[TeacherTargets],
    rows: Sequence[np.ndarray],
    name: str,
    dtype: torch.dtype | None,
    pinned: bool,
) -> Tensor | None:
    tensors = [getattr(t, name) for t in targets]
    if any(t is None for t in tensors):
        return None
    runs = [t[run] for t, own in zip(tensors, rows, strict=True) for run in _runs(own)]
    # Each run is copied once, from where the teacher wrote it to where it is sent from.
    count, shape = sum(len(own) for own in rows), tensors[0].shape[1:]
    out = torch.empty(count, *shape, dtype=dtype or tensors[0].dtype, pin_memory=pinned)
    place = 0
    for run in runs:
        out[place : place + len(run)] = run
        place += len(run)
    return out


def _runs(rows: np.ndarray) -> list[slice]:
    """Ascending row numbers as slices: the turns of an episode."""
    bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [slice(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(bounds)]


def placeholder(sample: Sample) -> Sample:
    """A sample's first response token only: what a rank without samples joins in with."""

    def first(data: Any) -> Any:
        arrays = {
            f.name: getattr(data, f.name)[:1]
            for f in fields(data)
            if f.name != "token_ids" and isinstance(getattr(data, f.name), np.ndarray | Tensor)
        }
        return replace(data, **arrays)

    rollout = sample.rollout
    short = replace(first(rollout), token_ids=rollout.token_ids[: rollout.prompt_length + 1])
    return replace(sample, rollout=short, targets=first(sample.targets))
