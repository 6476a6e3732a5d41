"""What the rest of fopd may know of an engine without importing it: plain facts, and where the rest is found.

    registry.ENGINES[name] ──> Engine ──┬── sampler, teacher: what a recipe may ask of it
                                        └── build: engines/<name>/build.py, which makes it

Importing this imports no torch.
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
    """An engine as the sampler."""

    draws: bool = False  # more tokens than the response's own at every position (loss.support mc)
    adapters: bool = False  # takes a LoRA adapter by itself (student.lora.publish adapter)
    copies: bool = True  # the worker itself copies new weights, not processes of the engine's own
    one_rotation: bool = False  # chooses the factors of a rotary embedding once, whatever a sequence's length


@dataclass(frozen=True)
class TeacherFacts:
    """An engine as a teacher."""

    targets: frozenset[TargetKind]  # what it can hand over
    by_name: frozenset[TargetKind] = frozenset()  # and what only where teacher.targets names it
    asked_tokens: bool = False  # log-probs of whatever tokens it is asked about (loss.student_k)
    our_forward: bool = False  # models are loaded, packed and sharded over ranks by us
    generates: int = 1  # tokens that it must generate behind those that it judges


@dataclass(frozen=True)
class Engine:
    """`name` is the value of `sampler.engine` and `teacher.engine`, the section of its keys, its folder."""

    name: str
    sampler: SamplerFacts | None = None
    teacher: TeacherFacts | None = None
    remote: bool = False  # it is somewhere else: no model, devices or cores of this machine
    claims: bool = False  # takes a share of a device at its start, whatever it needs
    cuda: bool = False  # made for CUDA: elsewhere `auto` does not take it
    split: str | None = (
        None  # key of its section: devices (on a CPU: processes) that one replica is split over
    )
    required: tuple[tuple[str, str], ...] = ()  # keys of its section that must be given, and what each is

    @property
    def build(self) -> EngineBuild:
        """What makes it. Imports torch, but not the library that the engine is: that is for its worker."""
        module: Any = importlib.import_module(f"fopd_cli.engines.{self.name}.build")
        return module

    def keys(self, section: Any) -> Any:
        """The engine's own keys in the recipe's section of a sampler or teacher."""
        return getattr(section, self.name)

    @property
    def split_key(self) -> str:
        """The key that says over how many devices a replica is split, as in `vllm.tensor_parallel`."""
        return f"{self.name}.{self.split}"

    def devices(self, section: Any) -> int:
        """Devices of one replica; on a CPU they are processes."""
        return 1 if self.split is None else getattr(self.keys(section), self.split)
