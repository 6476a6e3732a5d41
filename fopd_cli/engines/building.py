"""What an engine is built from, and what its `build.py` contains. A build module imports no optional library:
`missing` says whether it is installed, and a worker imports it when it builds the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fopd_cli.engines.protocols import Sampler, Teacher
from fopd_cli.errors import UserError
from fopd_cli.recipe import Lora
from fopd_cli.recipe import Sampler as SamplerSection
from fopd_cli.recipe import Teacher as TeacherSection


@dataclass(frozen=True)
class SamplerOrder:
    """What it takes to build a sampler."""

    section: SamplerSection
    model: str  # directory or hub id of the student
    dtype: torch.dtype
    device: torch.device
    context: int  # tokens in the longest possible sample
    vocab: int  # ids from this one up are never sampled
    logprobs: int = 0  # largest k of behaviour log-probs that requests ask for; -1: the whole vocabulary
    share: float | None = None  # fraction of a device, if the engine reserves one; None: as its section says
    adapter: Lora | None = None  # `load` gets adapters like this for these weights, not weights
    stale_kv: bool = False  # running requests keep their keys and values when new weights arrive


@dataclass(frozen=True)
class TeacherOrder:
    """What it takes to build a teacher. All ranks get the same order."""

    section: TeacherSection
    dtype: torch.dtype
    device: torch.device
    world: int  # ranks
    context: int  # tokens in the longest possible sample, in the teacher's context
    vocab: int  # ids from this one up are padding that the student does not have
    share: float | None = None  # fraction of a device, if the engine reserves one; None: as its section says
    student_k: int = 0  # how many of each position's top k are the student's own likeliest tokens
    one_rotation: bool = False  # the sampler's engine chooses rotary factors once, so the teacher must too
    join: Callable[[], None] = lambda: None  # joins the other ranks
    breathe: Callable[[], None] | None = None  # called between layers, on a CPU


class TooLong(UserError):
    """A sample is longer than a server's context."""


class RemoteTeacher(Teacher, Protocol):
    """A teacher on a server, which can be queried before a run."""

    def context(self) -> int | None:
        """Its model's context in tokens; None if the server does not say or cannot be reached."""

    def check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        """Raises `UserError` unless it answers, uses our token ids and scores the probe; `TooLong` if the
        probe exceeds its context.
        """

    def close(self) -> None:
        """Release a teacher that was only queried."""


class EngineBuild(Protocol):
    """The members of an engine's `build.py`. It lacks `sampler`, `teacher` or `remote` if the engine cannot
    be one.
    """

    def missing(self) -> str | None:
        """Why the engine cannot run here, and after a colon what to do; None if it can."""

    def refusals(
        self, key: str, section: SamplerSection | TeacherSection, config: Any
    ) -> Iterator[tuple[str, str]]:
        """Problems with this model on it, as (what, cure); `key` is `sampler` or names the teacher."""

    def sampler(self, order: SamplerOrder) -> Sampler: ...

    def teacher(self, order: TeacherOrder) -> Teacher: ...

    def remote(self, section: TeacherSection, vocab: int) -> RemoteTeacher: ...
