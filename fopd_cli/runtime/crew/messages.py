"""What the conductor and its engines say to each other. Commands are answered in the order in which they were
sent.

Each kind of engine has a union of the commands that it takes, `Event` is all that the conductor may hear: who
handles one ends in `assert_never`, so that a new message that somebody forgot is a type error, and raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fopd_cli.samples import Context, Prompt, Request, Rollout, SampleStats, StepReport

# ---- conductor -> worker


@dataclass
class GenerateCommand:
    requests: list[Request]


@dataclass
class LoadCommand:
    version: int


@dataclass
class AbortCommand:
    pass


@dataclass
class Slot:
    """Where one sample's teacher targets lie in the arena; `positions` is the response length, `teacher` who
    fills it.
    """

    offset: int
    positions: int
    teacher: int = 0


@dataclass
class ScoreCommand:
    """`again`: the slots hold older labels of these rollouts, whose contexts have changed since."""

    rollouts: list[Rollout]
    slots: list[Slot]
    again: bool = False


@dataclass
class GradeCommand:
    items: list[tuple[int, Prompt, str]]  # key, prompt, response text


@dataclass
class TurnCommand:
    """The environment is to execute what the student wrote; `life` names the episode, see `episodes.py`."""

    key: int
    life: int
    prompt: Prompt
    text: str
    now: int  # the student's version
    ended: int  # the token that ended the turn


@dataclass
class CancelCommand:
    """Episodes that are given up."""

    keys: list[int]


@dataclass
class ReplayCommand:
    """What would the context of a stored episode be now? `told` is the prompt as the teacher saw it, if not
    as the student did.
    """

    rollout: Rollout
    prompt: Prompt
    told: np.ndarray | None
    template: str | None
    now: int


@dataclass
class TrainCommand:
    """Take optimizer step `step` on these samples; `lags` are their ages in optimizer steps."""

    step: int
    rollouts: list[Rollout]
    slots: list[Slot]
    lags: list[int]


@dataclass
class MeasureCommand:
    """The same without a step."""

    rollouts: list[Rollout]
    slots: list[Slot]
    lags: list[int]


@dataclass
class SaveCommand:
    folder: Path


@dataclass
class SleepCommand:
    pass


@dataclass
class WakeCommand:
    pass


@dataclass
class StopCommand:
    pass


SamplerCommand = GenerateCommand | LoadCommand | AbortCommand
TeacherCommand = ScoreCommand
LearnerCommand = TrainCommand | MeasureCommand | SaveCommand
GraderCommand = GradeCommand
EnvironmentCommand = TurnCommand | CancelCommand | ReplayCommand
RestCommand = SleepCommand | WakeCommand
Command = SamplerCommand | TeacherCommand | LearnerCommand | GraderCommand | EnvironmentCommand


# ---- worker -> conductor


@dataclass
class Span:
    """Something a worker did, in seconds since the epoch: the timeline's and the busy shares' raw
    material.
    """

    name: str
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ready:
    """The worker has built its engine."""

    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sampled:
    """`aborts`: how many `AbortCommand`s the sampler had obeyed by then. A key that was aborted may be
    sampled again, and what was on its way before is not to be taken for that.
    """

    rollouts: list[Rollout]
    spans: list[Span]
    aborts: int


@dataclass
class Loaded:
    version: int
    span: Span


@dataclass
class Scored:
    keys: list[int]
    span: Span


@dataclass
class Graded:
    grades: list[tuple[int, float, dict[str, float]]]  # key, score, figures beside it
    span: Span


@dataclass
class Observed:
    """What the environment says to a turn, as tokens to append; None: the episode is over."""

    key: int
    life: int
    token_ids: np.ndarray | None
    calls: list[dict[str, Any]]
    answer: str | None
    span: Span


@dataclass
class Replayed:
    """The context of a stored episode as it is now; None: as it was."""

    key: int
    context: Context | None
    span: Span


@dataclass
class Trained:
    report: StepReport
    spans: list[Span]


@dataclass
class Measured:
    stats: SampleStats
    span: Span


@dataclass
class Saved:
    extra: dict[str, Any]
    span: Span
    error: str | None = None  # the disk is full or refuses; the run goes on


@dataclass
class Asleep:
    pass


@dataclass
class Awake:
    pass


@dataclass
class Failed:
    """The worker raised. `user` says that the message is meant for the user as it stands."""

    kind: Literal["user", "worker"]
    message: str


@dataclass
class Lost:
    """Said by the fleet for a worker that died, hung or raised, and is stopped: `reason` names it, and its
    log. `mistake`: it is the user's, and starting it again would not help.
    """

    reason: str
    mistake: bool = False


Answer = Sampled | Loaded | Scored | Graded | Observed | Replayed | Trained | Measured | Saved
Message = Answer | Ready | Asleep | Awake | Failed | Lost

# ---- crew -> conductor


@dataclass
class Worked:
    """A worker did something, whatever came of it."""

    worker: str
    span: Span


@dataclass
class Leased:
    """It is this role's turn."""

    role: Literal["sampler", "teacher", "learner"]


@dataclass
class EngineLost:
    """What the engine had under way has to be done again. `restarted`: it is being started again. `fatal`:
    why the run cannot go on; `mistake`: because of what the user has to mend.
    """

    reason: str
    restarted: bool = False
    fatal: bool = False
    mistake: bool = False


@dataclass
class EngineBack:
    """It takes commands again."""


Event = Answer | Worked | Leased | EngineLost | EngineBack
