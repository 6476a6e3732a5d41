"""What the rest of fopd can know about an engine without importing it: plain facts, and where the rest is.

    registry.ENGINES[name] ──> Engine ──┬── sampler, teacher: what a recipe may ask of it
                                        └── build: engines/<name>/build.py, which makes it

This module does not import torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fopd_cli.names import TargetKind

if TYPE_CHECKING:
    from fopd_cli.engines.building import EngineBuild


@dataclass(frozen=True)
class SamplerFacts:
    """What an engine can do as the sampler."""

    draws: bool = False  # can draw extra tokens at every position (loss.support mc)
    adapters: bool = False  # accepts a bare LoRA adapter (student.lora.publish adapter)
    one_rotation: bool = False  # chooses rotary factors once, whatever a sequence's length
    # the share of its places that must be free before requests join running ones, in a pass of their own; 0:
    # they share the next pass
    joins: float = 0.0


@dataclass(frozen=True)
class TeacherFacts:
    """What an engine can do as a teacher."""

    targets: frozenset[TargetKind]  # what it can hand over
    by_name: frozenset[TargetKind] = frozenset()  # and what it hands over only if teacher.targets names it
    asked_tokens: bool = False  # can give log-probs of any requested tokens (loss.student_k)
    our_forward: bool = False  # fopd loads, packs and shards its models
    generates: int = 1  # tokens that it must generate after those that it judges


@dataclass(frozen=True)
class Engine:
    """`name` is its value in `sampler.engine` and `teacher.engine`, its recipe section and its folder."""

    name: str
    sampler: SamplerFacts | None = None
    teacher: TeacherFacts | None = None
    remote: bool = False  # it runs elsewhere: uses no model, devices or cores of this machine
    claims: bool = False  # reserves a share of a device when it starts, whatever it needs
    cuda: bool = False  # meant for CUDA: `auto` does not choose it elsewhere
    # the key in its section for how many devices (on a CPU: processes) a replica is split over
    split: str | None = None
    required: tuple[tuple[str, str], ...] = ()  # required keys of its section, and what each one is

    @property
    def build(self) -> EngineBuild:
        """Its build module. Imports torch, but not the engine's own library: the worker imports that."""
        module: Any = importlib.import_module(f"fopd_cli.engines.{self.name}.build")
        return module

    def keys(self, section: Any) -> Any:
        """The engine's own keys in the recipe's section of a sampler or teacher."""
        return getattr(section, self.name)

    @property
    def split_key(self) -> str:
        """The key for how many devices a replica is split over, such as `vllm.tensor_parallel`."""
        return f"{self.name}.{self.split}"

    def devices(self, section: Any) -> int:
        """Devices per replica; on a CPU, processes."""
        return 1 if self.split is None else getattr(self.keys(section), self.split)

    def in_process(self, section: Any) -> bool:
        """Whether a replica computes in its worker's own process; split, it has processes of its own."""
        return self.devices(section) == 1
