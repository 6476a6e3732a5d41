"""What an engine is made from, and what its `build.py` has. A build module imports no library that only some
machines have: `missing` says whether it is there, and a worker imports it when it makes the engine.
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
    """A sampler, to be made."""

    section: SamplerSection
    model: str  # directory or hub id of the student
    dtype: torch.dtype
    device: torch.device
    context: int  # tokens of the longest sample that there can be
    vocab: int  # ids from here on are never sampled
    logprobs: int = 0  # largest k of behaviour log-probs that requests ask for; -1: the whole vocabulary
    share: float | None = None  # of a device, for an engine that claims one; None: as its section says
    adapter: Lora | None = None  # what `load` will be given are such adapters for these weights, not weights
    stale_kv: bool = False  # running requests keep their keys and values when new weights come


@dataclass(frozen=True)
class TeacherOrder:
    """A teacher, to be made. On several ranks each has the same order."""

    section: TeacherSection
    dtype: torch.dtype
    device: torch.device
    world: int  # ranks
    context: int  # tokens of the longest sample that there can be, as it judges them
    vocab: int  # ids from here on are padding that the student does not have
    share: float | None = None  # of a device, for an engine that claims one; None: as its section says
    student_k: int = 0  # how many of a position's classes are the student's own likeliest tokens
    one_rotation: bool = False  # the sampler's engine chooses rotary factors once: so must the teacher
    join: Callable[[], None] = lambda: None  # meets the other ranks
    breathe: Callable[[], None] | None = None  # to be called between two layers, on a CPU


class TooLong(UserError):
    """A sample is longer than a server's context."""


class RemoteTeacher(Teacher, Protocol):
    """A teacher on a server: it can be asked about itself before a run."""

    def context(self) -> int | None:
        """Tokens that its model takes; None where the server does not tell, or cannot be reached."""

    def check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        """Raises `UserError` unless it answers, has our token ids and judges the probe; `TooLong` if that is
        more than it takes.
        """

    def close(self) -> None:
        """Of one that was only asked about itself."""


class EngineBuild(Protocol):
    """The members of an engine's `build.py`; one that is no sampler, no teacher or not remote lacks those."""

    def missing(self) -> str | None:
        """Why the engine cannot run here, and after a colon what to do; None if it can."""

    def refusals(
        self, key: str, section: SamplerSection | TeacherSection, config: Any
    ) -> Iterator[tuple[str, str]]:
        """What is wrong with this model on it, as (what, cure); `key` is sampler, or names the teacher."""

    def sampler(self, order: SamplerOrder) -> Sampler: ...

    def teacher(self, order: TeacherOrder) -> Teacher: ...

    def remote(self, section: TeacherSection, vocab: int) -> RemoteTeacher: ...
