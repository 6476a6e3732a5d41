"""Names that recipe, losses and engines share. This module does not import torch."""

from __future__ import annotations

import re
from typing import Literal

SET_NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")  # of a held-out set: every tracker takes such names
SET_NAME_RULE = "use at most 60 letters, digits, '_', '.' and '-'"

LossKind = Literal["forward_kl", "reverse_kl", "jsd"]  # each has a formula in `losses/divergence.py`
Support = Literal["full", "topk", "sampled", "mc"]
Advantage = Literal["cached", "recomputed"]
DriftKind = Literal["sampled", "quadratic", "topk", "exact"]
EngineRole = Literal["sampler", "teacher", "learner", "grader", "environment"]  # in a run
WorkerRole = Literal[EngineRole, "eval", "judge"]  # of a process; the last two are other commands'
TargetKind = Literal["hidden", "topk", "sampled"]  # what a teacher hands over for each token

BESIDE = ("writer", "publisher")  # tracks of the timeline beside a learner's steps


def beside(worker: str, what: Literal["writer", "publisher"]) -> str:
    """The track of what a worker does in a thread beside its work."""
    return f"{worker}-{what}"


def is_beside(track: str) -> bool:
    """Whether a track is not a worker's own."""
    return track.rpartition("-")[2] in BESIDE
