"""Which prompts fit into the student's context and, as the teacher is told them, into the teacher's, with
room for the response.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fopd_cli.engines.models import hf
from fopd_cli.engines.registry import teacher_facts
from fopd_cli.errors import UserError
from fopd_cli.recipe import Recipe, Teacher
from fopd_cli.runtime.scheduling.prompts import SPLITS, PromptStream


@dataclass(frozen=True)
class Room:
    """What one model can take. `teacher` is its name, None for the student."""

    key: str
    context: int | None  # tokens; None: not known
    teacher: str | None = None
    told: bool = False  # the teacher has a prompt of its own (teacher.context or teacher.template)
    extra: int = 0  # tokens that an engine generates after what it scores


def rooms(
    recipe: Recipe, student: Any, teachers: Mapping[str, tuple[str, Any]], served: Mapping[str, int]
) -> list[Room]:
    """The rooms of all models, from the student's configuration, (key, configuration) of local teachers by
    name, and the contexts of servers.
    """
    found = [Room("student.model", _context(student))]
    for t in recipe.teachers:
        key, config = teachers.get(t.name, ("teacher.http.url", None))
        known = served.get(t.name) if config is None else _context(config)
        found.append(Room(key, known, t.name, tells(t), teacher_facts(t).generates))
    return found


def tells(teacher: Teacher) -> bool:
    """Whether the teacher reads a different prompt than the student."""
    return teacher.context is not None or teacher.template == "teacher"


def _context(config: Any) -> int | None:
    return getattr(hf.text_config(config), "max_position_embeddings", None)


def keep_what_fits(recipe: Recipe, stream: PromptStream, found: Sequence[Room]) -> list[str]:
    """Leave out prompts that are too long, as `task.overlong` says; returns what was done, one line per
    split.

    Raises `UserError` if none may be left out, or none is left.
    """
    said = []
    for split in SPLITS:
        long = dict(_overlong(recipe, stream, split, found))
        if not long:
            continue
        index, why = next(iter(long.items()))
        prompt, count = stream.prompts[split][index], f"{len(long)} of {len(stream.kept[split])}"
        name = f"task.{split}: {prompt.place}" if prompt.place else f"task: {split} prompt {index}"
        cure = "lower sampler.max_new_tokens, shorten the prompts, or take a model with a longer context"
        # None: the prompts are generated, as long as the recipe says
        choice = getattr(recipe.task, "overlong", None)
        if choice != "drop":
            other = ", or set task.overlong: drop" if choice else ""
            raise UserError(f"{name} {why} ({count} {split} prompts are too long); {cure}{other}")
        for held_out in stream.held_out if split == "eval" else ():
            own = [i for i in stream.kept[split] if stream.prompts[split][i].held_out == held_out]
            if all(i in long for i in own):
                prompt = stream.prompts[split][own[0]]
                raise UserError(
                    f"held-out set {held_out}: {prompt.where} {long[own[0]]}, and so with all of it; {cure}"
                )
        if len(long) == len(stream.kept[split]):
            raise UserError(f"{name} {why}, and so with all {len(long)} {split} prompts; {cure}")
        stream.drop(split, long)
        said.append(f"{count} {split} prompts are too long and left out (task.overlong): {name} {why}")
    return said


def _overlong(
    recipe: Recipe, stream: PromptStream, split: str, found: Sequence[Room]
) -> Iterator[tuple[int, str]]:
    """(index, what is too long for which model) of each prompt that does not fit."""
    new = recipe.sampler.max_new_tokens
    if split == "eval":
        new = recipe.eval.max_new_tokens or new
    for index in stream.kept[split]:
        for room in found:
            if room.teacher not in (None, stream.teacher_name(split, index)) or room.context is None:
                continue
            tokens = stream.tokens(split, index, room.teacher is not None)
            if tokens + new + room.extra > room.context:
                what = " as the teacher is told it (teacher.context, teacher.template)" if room.told else ""
                yield (
                    index,
                    (
                        f"has {tokens} tokens{what}, with {new} new ones that is more than the context of "
                        f"{room.context} of {room.key}"
                    ),
                )
                break
