"""The schedule's vocabulary: the state of a sample, what the recipe says, what the conductor is told to
do.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from fopd_cli.samples import SampleId

Role = Literal["sampler", "teacher", "learner"]


class State(StrEnum):
    """Where a sample is. One that was trained on, gated or dropped by a refresh no longer has a ticket."""

    PLANNED = "planned"  # its prompt must be sampled again (after a refresh or a restart)
    SAMPLING = "sampling"
    SAMPLED = "sampled"
    SCORING = "scoring"
    SCORED = "scored"
    REEXECUTING = "reexecuting"  # scored; its calls are being executed again
    REEXECUTED = "reexecuted"  # its context has changed: it must be scored again
    TRAINING = "training"


@dataclass
class Ticket:
    """One sample in flight. `version` is the oldest that sampled any of its tokens (at admission: the
    sampler's).
    """

    key: int  # unique in a run; training tickets are numbered in the order of the prompt stream
    sample: SampleId
    state: State = State.PLANNED
    version: int = -1
    graded: bool = False
    drawn: bool = False  # counted in `drawn` already (a restart does not draw again)
    teacher: int = 0  # the one that judges it
    reexecuted: bool = False  # its calls have been executed again

    @property
    def evaluation(self) -> bool:
        return self.sample.split == "eval"


@dataclass(frozen=True)
class ScheduleConfig:
    """What the recipe says about scheduling, resolved."""

    steps: int
    batch: int
    max_lag: int
    lag: int | None  # fixed lag; max_lag is then ignored
    inflight: Literal["keep", "wait", "keep_stale_kv"]
    replicas: int
    concurrency: int  # running samples per replica
    score_batch: tuple[int, ...]  # each teacher's samples per call, at most
    exclusive: bool  # time-sliced: one role at a time
    eval_versions: Container[int]
    score_ahead: int = 2  # each teacher's calls under way at once
    reexecutions: int = 0  # samples whose calls are executed again before an optimizer step, at most
    reexecute_min_lag: int = 1  # only samples at least this many versions old
    reexecute_ahead: bool = False  # while the learner is still at the previous step

    @property
    def bound(self) -> int:
        return self.max_lag if self.lag is None else self.lag

    @property
    def deterministic(self) -> bool:
        """Whether groups are formed by number instead of by arrival, so that two runs compute the same."""
        return self.bound == 0 or self.lag is not None


@dataclass(frozen=True)
class Generate:
    replica: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Load:
    replica: int
    version: int


@dataclass(frozen=True)
class Score:
    teacher: int
    keys: tuple[int, ...]
    again: bool = False  # on changed contexts


@dataclass(frozen=True)
class Reexecute:
    """Execute the calls of these samples again, to see whether their contexts, as of step `now`, are still
    those that were scored.
    """

    keys: tuple[int, ...]
    now: int


@dataclass(frozen=True)
class Train:
    step: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Evaluate:
    """Compare some held-out samples with the teacher, with the learner's version."""

    version: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Lease:
    """Time-sliced: put `sleeper` to sleep, then wake `waker`."""

    sleeper: Role | None
    waker: Role


Action = Generate | Load | Score | Reexecute | Train | Evaluate | Lease
