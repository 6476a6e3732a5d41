"""The order of prompts: which sample is the n-th, fixed for good and without state."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fopd_cli.engines.text.templates import Frame
from fopd_cli.errors import UserError
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.names import SET_NAME, SET_NAME_RULE
from fopd_cli.recipe import Recipe, Teacher
from fopd_cli.runtime.scheduling.tickets import ScheduleConfig
from fopd_cli.samples import Prompt, SampleId
from fopd_cli.tasks import Task
from fopd_cli.tasks.privileged import told

SPLITS = ("train", "eval")
SHOWN = 2  # prompts of each held-out set whose answers are written down


class PromptStream:
    """Each epoch is a fresh permutation of the training prompts; each prompt is sampled `samples_per_prompt`
    times in a row.

    `kept` holds the indices of each split's prompts in use: all, unless some were dropped. `frames` turn
    prompts into tokens for teachers with a frame of their own.
    """

    def __init__(
        self,
        task: Task,
        frame: Frame,
        seed: int,
        samples_per_prompt: int,
        teachers: Sequence[Teacher] = (),
        frames: Mapping[str, Frame] | None = None,
    ) -> None:
        self.prompts: dict[str, Sequence[Prompt]] = {
            "train": task.prompts("train"),
            "eval": task.prompts("eval"),
        }
        self.kept: dict[str, list[int]] = {
            split: list(range(len(found))) for split, found in self.prompts.items()
        }
        self.notices: list[str] = list(getattr(task, "notices", ()))
        self.frame, self.seed, self.samples_per_prompt = frame, seed, samples_per_prompt
        self.episodic = hasattr(task, "episode")  # prompts begin conversations with an environment
        self.reexecutable = self.episodic or hasattr(task, "replay")  # contexts can change
        self._teachers = {t.name: i for i, t in enumerate(teachers)}
        self._contexts = [t.context for t in teachers]
        self._frames = [(frames or {}).get(t.name) for t in teachers]
        self._check_teachers()
        self._check_sets()
        self._orders: dict[int, list[int]] = {}
        self._shown: set[int] | None = None
        self._ids: dict[tuple[str, int], np.ndarray] = {}
        self._told: dict[tuple[str, int], np.ndarray] = {}

    def drop(self, split: str, indices: Iterable[int]) -> None:
        """Leave out prompts. Those that stay keep their index, and with it their random numbers."""
        gone = set(indices)
        self.kept[split] = [i for i in self.kept[split] if i not in gone]
        self._orders, self._shown = {}, None

    def train_id(self, number: int) -> SampleId:
        """The `number`-th training sample of the run."""
        group, repeat = divmod(number, self.samples_per_prompt)
        epoch, position = divmod(group, len(self.kept["train"]))
        if epoch not in self._orders:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            used = set(self.kept["train"])
            self._orders = {
                epoch: [i for i in rng.permutation(len(self.prompts["train"])).tolist() if i in used]
            }
        return SampleId("train", epoch, self._orders[epoch][position], repeat)

    def teacher(self, sample: SampleId) -> int:
        """Number of the teacher that judges a sample: the one that its prompt names, else the first."""
        return self._number(self.prompt(sample))

    def _number(self, prompt: Prompt) -> int:
        return self._teachers.get(prompt.teacher or "", 0)

    def teacher_name(self, split: str, index: int) -> str | None:
        """The name of the teacher that judges it; None if no teachers are known here."""
        return list(self._teachers)[self._number(self.prompts[split][index])] if self._teachers else None

    def told(self, sample: SampleId) -> np.ndarray | None:
        """int32 token ids of the prompt as its teacher sees it; None if that is what the student sees."""
        return self.as_told(sample.split, sample.prompt)

    def as_told(self, split: str, index: int) -> np.ndarray | None:
        """The same for a prompt."""
        prompt, key = self.prompts[split][index], (split, index)
        number = self._number(prompt)
        template, frame = (self._contexts[number], self._frames[number]) if self._contexts else (None, None)
        if template is None and frame is None:
            return None
        if key not in self._told:
            prompt = prompt if template is None else told(prompt, template)
            if frame is not None and prompt.messages is None:
                prompt = replace(prompt, text=None, messages=[{"role": "user", "content": prompt.text or ""}])
            self._told[key] = (frame or self.frame).prompt(prompt)
        return self._told[key]

    def _check_teachers(self) -> None:
        for split, prompts in self.prompts.items():
            for p in prompts:
                if p.teacher is not None and self._teachers and p.teacher not in self._teachers:
                    raise UserError(
                        f"task: {p.place or f'{split} prompt {p.index}'} names the teacher {p.teacher!r}; "
                        f"there are {', '.join(self._teachers)}"
                    )

    @property
    def held_out(self) -> list[str]:
        """Names of the held-out sets, in the order of their prompts; empty if there is only one."""
        names = dict.fromkeys(p.held_out for p in self.prompts["eval"] if p.held_out is not None)
        return list(names) if len(names) > 1 else []

    def is_shown(self, sample: SampleId) -> bool:
        """Whether people read the answer at every evaluation: the first one to each set's first prompts."""
        if self._shown is None:
            by_set = defaultdict[str | None, list[int]](list)
            for i in self.kept["eval"]:
                by_set[self.prompts["eval"][i].held_out].append(i)
            self._shown = {i for own in by_set.values() for i in own[:SHOWN]}
        return sample.split == "eval" and sample.repeat == 0 and sample.prompt in self._shown

    def _check_sets(self) -> None:
        prompts = self.prompts["eval"]
        for p in prompts:
            if p.held_out is not None and not SET_NAME.fullmatch(p.held_out):
                raise UserError(
                    f"task: {p.where}: {p.held_out!r} cannot name a held-out set; {SET_NAME_RULE}"
                )
        nameless = next((p for p in prompts if p.held_out is None), None)
        if nameless is not None and self.held_out:
            raise UserError(
                f"task: {nameless.where} names no held-out set, and others do ({', '.join(self.held_out)}); "
                "name it in all of them, or in none"
            )

    def prompt(self, sample: SampleId) -> Prompt:
        return self.prompts[sample.split][sample.prompt]

    def token_ids(self, sample: SampleId) -> np.ndarray:
        """int32 (prompt_length,), encoded once."""
        return self.encoded(sample.split, sample.prompt)

    def encoded(self, split: str, index: int) -> np.ndarray:
        key = (split, index)
        if key not in self._ids:
            self._ids[key] = self.frame.prompt(self.prompts[split][index])
        return self._ids[key]

    def largest_id(self, split: str, index: int) -> int:
        """The largest token id of a prompt, as the student or its teacher sees it."""
        seen = [self.encoded(split, index), self.as_told(split, index)]
        return max((int(ids.max()) for ids in seen if ids is not None and len(ids)), default=-1)

    def tokens(self, split: str, index: int, judged: bool) -> int:
        """Number of tokens of a prompt, as the student sees it, or as its teacher does."""
        seen = self.as_told(split, index) if judged else None
        return len(self.encoded(split, index) if seen is None else seen)

    def longest(self, split: str, judged: bool) -> int:
        """Tokens of the longest prompt in use."""
        return max(self.tokens(split, i, judged) for i in self.kept[split])


def context_tokens(recipe: Recipe, stream: PromptStream, judged: bool) -> int:
    """Tokens of the longest possible sample, as the student has it, or as teachers judge it."""
    new = {
        "train": recipe.sampler.max_new_tokens,
        "eval": recipe.eval.max_new_tokens or recipe.sampler.max_new_tokens,
    }
    return max(stream.longest(split, judged) + new[split] for split in SPLITS)


def evaluation_ids(recipe: Recipe, stream: PromptStream) -> list[SampleId]:
    """All held-out samples; the same ids, hence the same random numbers, at every version and in `fopd
    eval`.
    """
    return [
        SampleId("eval", 0, prompt, repeat)
        for prompt in stream.kept["eval"]
        for repeat in range(recipe.eval.samples)
    ]


def check_followed(recipe: Recipe, stream: PromptStream) -> None:
    """Raises `UserError` unless eval.follow is one of the held-out sets."""
    name, there = recipe.eval.follow, stream.held_out
    if name is None or name in there:
        return
    if not there:
        raise UserError(
            f"eval.follow: {name!r}, but there is one held-out set only; leave it out, or name several in "
            "task.eval"
        )
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there)}"
    raise UserError(f"eval.follow: there is no held-out set {name!r}; {hint}")


@dataclass(frozen=True)
class EvalVersions:
    """Before the first step, after the last, and every `every` steps (0: never) in between."""

    steps: int
    every: int

    def __contains__(self, version: object) -> bool:
        if not isinstance(version, int) or not 0 <= version <= self.steps:
            return False
        return version in (0, self.steps) or (self.every > 0 and version % self.every == 0)


def schedule_config(recipe: Recipe, replicas: int, exclusive: bool, reexecutable: bool) -> ScheduleConfig:
    """The recipe in the form that the schedule takes."""
    reexecute = recipe.freshness.reexecute
    wanted = POLICIES[recipe.freshness.policy].weights == "freshness" or reexecute.labels == "current"
    eval_versions = EvalVersions(recipe.learner.steps, recipe.eval.every)
    return ScheduleConfig(
        steps=recipe.learner.steps,
        batch=recipe.learner.batch_samples,
        max_lag=recipe.schedule.max_lag,
        lag=recipe.schedule.lag,
        inflight=recipe.schedule.inflight,
        replicas=replicas,
        concurrency=recipe.sampler.concurrency,
        score_batch=tuple(t.batch_samples for t in recipe.teachers),
        exclusive=exclusive,
        eval_versions=eval_versions,
        reexecutions=math.ceil(reexecute.share * recipe.learner.batch_samples)
        if reexecutable and wanted
        else 0,
        reexecute_min_lag=reexecute.min_lag,
        reexecute_ahead=reexecute.labels == "cached",
    )
