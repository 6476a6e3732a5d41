"""All engines. A new one needs a folder beside this file, with a `record.py` and a `build.py`, and a line
here. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fopd_cli.engines.http.record import RECORD as HTTP
from fopd_cli.engines.record import Engine, SamplerFacts, TeacherFacts
from fopd_cli.engines.transformers.record import RECORD as TRANSFORMERS
from fopd_cli.engines.vllm.record import RECORD as VLLM
from fopd_cli.names import TargetKind

if TYPE_CHECKING:
    from fopd_cli.recipe import Recipe, Sampler, Teacher

# In the order in which `auto` tries the local ones.
ENGINES = {engine.name: engine for engine in (VLLM, TRANSFORMERS, HTTP)}
AUTO = "auto"
SAMPLERS = tuple(name for name, engine in ENGINES.items() if engine.sampler is not None)
TEACHERS = tuple(name for name, engine in ENGINES.items() if engine.teacher is not None)


def engine_of(section: Sampler | Teacher) -> Engine:
    """The section's engine. An `auto` not yet resolved (`auto.py`) means the one that runs anywhere."""
    return TRANSFORMERS if section.engine == AUTO else ENGINES[section.engine]


def sampler_facts(section: Sampler) -> SamplerFacts:
    facts = engine_of(section).sampler
    assert facts is not None  # the schema allows no other
    return facts


def teacher_facts(section: Teacher) -> TeacherFacts:
    facts = engine_of(section).teacher
    assert facts is not None
    return facts


def candidates(section: Sampler | Teacher) -> Iterator[Engine]:
    """The engines that the section may resolve to."""
    if section.engine != AUTO:
        yield ENGINES[section.engine]
    else:
        yield from (engine for engine in ENGINES.values() if not engine.remote)


def hands_over(kind: TargetKind, section: Teacher) -> bool:
    """Whether this teacher can hand these over on one of those engines."""
    named = section.engine != AUTO and section.targets == kind
    facts = [e.teacher for e in candidates(section) if e.teacher is not None]
    return any(kind in f.targets or (named and kind in f.by_name) for f in facts)


def unfit_to_sample(engine: Engine, recipe: Recipe) -> str | None:
    """What the recipe asks of its sampler that this engine lacks, with its key; None if nothing."""
    facts, lora = engine.sampler, recipe.student.lora
    if facts is None:
        return "it samples nothing"
    if recipe.support == "mc" and not facts.draws:
        return "loss.support: mc"
    if lora is not None and lora.publish == "adapter" and not facts.adapters:
        return "student.lora.publish: adapter"
    return None


def unfit_to_teach(engine: Engine, recipe: Recipe) -> str | None:
    """The same for a teacher."""
    facts = engine.teacher
    if facts is None:
        return "it judges nothing"
    if recipe.targets not in facts.targets:
        return f"teacher.targets: {recipe.targets}"
    if recipe.loss.student_k and not facts.asked_tokens:
        return f"loss.student_k: {recipe.loss.student_k}"
    return None
