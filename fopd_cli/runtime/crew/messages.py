"""Messages between the conductor and its engines. Commands are answered in the order in which they were sent;
only `Saved` and `Published` come whenever they do.

Each kind of engine has a union of the commands that it takes; `Event` is all that the conductor may receive.
Code that handles one ends in `assert_never`, so a forgotten message is a type error, and raises.
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
class Region:
    """Where one sample's teacher targets are in the arena; `positions` is the response length, `teacher` the
    teacher that fills it.
    """

    offset: int
    positions: int
    teacher: int = 0


@dataclass
class ScoreCommand:
    """`again`: the regions hold older labels of these rollouts, whose contexts have changed since."""

    rollouts: list[Rollout]
    regions: list[Region]
    again: bool = False


@dataclass
class GradeCommand:
    items: list[tuple[int, Prompt, str]]  # key, prompt, response text


@dataclass
class TurnCommand:
    """The environment must execute what the student wrote. `episode` is a number, see `episodes.py`."""

    key: int
    episode: int
    prompt: Prompt
    text: str
    now: int  # the student's version
    ended: int  # the token that ended the turn


@dataclass
class CancelCommand:
    """Give up these episodes."""

    keys: list[int]


@dataclass
class ReexecuteCommand:
    """Find out what the context of a stored episode would be now. `told` is the prompt as the teacher saw it,
    if that is not what the student saw.
    """

    rollout: Rollout
    prompt: Prompt
    told: np.ndarray | None
    template: str | None
    now: int


@dataclass
class TrainCommand:
    """Take optimizer step `step` on these samples; `lags` are their ages in optimizer steps. Answered twice:
    by `Trained`, from when on the learner takes the next step, and by `Published`, before the next `Trained`.
    """

    step: int
    rollouts: list[Rollout]
    regions: list[Region]
    lags: list[int]


@dataclass
class EvaluateCommand:
    """The same without a step. `named`: keys of the samples whose answers people read."""

    rollouts: list[Rollout]
    regions: list[Region]
    lags: list[int]
    named: list[int]


@dataclass
class SaveCommand:
    """Write the learner's state into this folder. Answered twice: by `Staged`, from when on the learner takes
    steps again, and by `Saved`. `staged`: it writes a copy, beside these steps.
    """

    folder: Path
    staged: bool


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
LearnerCommand = TrainCommand | EvaluateCommand | SaveCommand
GraderCommand = GradeCommand
EnvironmentCommand = TurnCommand | CancelCommand | ReexecuteCommand
RestCommand = SleepCommand | WakeCommand
Command = SamplerCommand | TeacherCommand | LearnerCommand | GraderCommand | EnvironmentCommand


# ---- worker -> conductor


@dataclass
class Span:
    """Something that a worker did, in seconds since the epoch: for the timeline and the busy shares."""

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
    """`aborts`: how many `AbortCommand`s the sampler had obeyed by then. An aborted key may be sampled again,
    and a result sent before the abort must not be mistaken for the new one.
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
    grades: list[tuple[int, float, dict[str, float]]]  # key, score, further metrics
    span: Span


@dataclass
class Observed:
    """The environment's answer to a turn, as tokens to append; None: the episode is over."""

    key: int
    episode: int
    token_ids: np.ndarray | None
    calls: list[dict[str, Any]]
    answer: str | None
    span: Span


@dataclass
class Reexecuted:
    """The context of a stored episode as it is now; None: unchanged."""

    key: int
    context: Context | None
    span: Span


@dataclass
class Trained:
    report: StepReport
    span: Span


@dataclass
class Published:
    """All of this version is in its slot. `nbytes`: what was written."""

    version: int
    nbytes: int
    span: Span


@dataclass
class Evaluated:
    stats: SampleStats
    span: Span


@dataclass
class Staged:
    """The learner's state is safe from its next steps."""

    span: Span


@dataclass
class Saved:
    """It is on the disk. `files`: size and SHA-256 of each file in the learner's folder, as in a manifest."""

    extra: dict[str, Any]
    span: Span
    error: str | None = None  # the disk is full or refuses; the run goes on
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Asleep:
    pass


@dataclass
class Awake:
    pass


@dataclass
class Failed:
    """The worker raised. Kind `user`: the message is meant for the user, unchanged."""

    kind: Literal["user", "worker"]
    message: str


@dataclass
class Lost:
    """Sent by the fleet for a worker that died, hung or raised, and is stopped. `reason` names it and its
    log. `mistake`: it was the user's, and a restart would not help.
    """

    reason: str
    mistake: bool = False


Learned = Trained | Published | Evaluated | Staged | Saved
Answer = Sampled | Loaded | Scored | Graded | Observed | Reexecuted | Learned
Message = Answer | Ready | Asleep | Awake | Failed | Lost

# ---- crew -> conductor


@dataclass
class Worked:
    """A worker did something, whatever the result."""

    worker: str
    span: Span


@dataclass
class Leased:
    """It is this role's turn."""

    role: Literal["sampler", "teacher", "learner"]


@dataclass
class EngineLost:
    """The engine's unfinished work must be redone. `restarted`: it is being restarted. `fatal`: the run
    cannot go on; `mistake`: because of something that the user must fix.
    """

    reason: str
    restarted: bool = False
    fatal: bool = False
    mistake: bool = False


@dataclass
class EngineBack:
    """The engine takes commands again."""


Event = Answer | Worked | Leased | EngineLost | EngineBack
