"""The order of prompts: which sample is the n-th, for ever, without state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fopd_cli.engines import hf
from fopd_cli.errors import UserError
from fopd_cli.freshness.policies import POLICIES
from fopd_cli.recipe import Recipe, Teacher
from fopd_cli.runtime.tickets import ScheduleConfig
from fopd_cli.samples import Prompt, SampleId
from fopd_cli.tasks import Task
from fopd_cli.tasks.privileged import told


class PromptStream:
    """Each epoch is a fresh permutation of the training prompts; each prompt is sampled `samples_per_prompt` times in a row."""

    def __init__(
        self, task: Task, tokenizer: object, seed: int, samples_per_prompt: int, teachers: Sequence[Teacher] = ()
    ) -> None:
        self.prompts: dict[str, Sequence[Prompt]] = {"train": task.prompts("train"), "eval": task.prompts("eval")}
        self.tokenizer, self.seed, self.samples_per_prompt = tokenizer, seed, samples_per_prompt
        self.episodic = hasattr(task, "episode")  # prompts begin conversations with an environment
        self.replayable = self.episodic or hasattr(task, "replay")  # contexts can change
        self._teachers = {t.name: i for i, t in enumerate(teachers)}
        self._contexts = [t.context for t in teachers]
        self._check_teachers()
        self._orders: dict[int, np.ndarray] = {}
        self._ids: dict[tuple[str, int], np.ndarray] = {}
        self._told: dict[tuple[str, int], np.ndarray] = {}

    def train_id(self, number: int) -> SampleId:
        """The `number`-th training sample of the run."""
        group, replica = divmod(number, self.samples_per_prompt)
        epoch, position = divmod(group, len(self.prompts["train"]))
        if epoch not in self._orders:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._orders = {epoch: rng.permutation(len(self.prompts["train"]))}
        return SampleId("train", epoch, int(self._orders[epoch][position]), replica)

    def teacher(self, sample: SampleId) -> int:
        """Number of the teacher that judges a sample: the one that its prompt names, else the first."""
        return self._teachers.get(self.prompt(sample).teacher or "", 0)

    def told(self, sample: SampleId) -> np.ndarray | None:
        """int32 token ids of the prompt as its teacher sees it; None if that is what the student sees."""
        return self._as_told(sample.split, sample.prompt)

    def _as_told(self, split: str, index: int) -> np.ndarray | None:
        prompt, key = self.prompts[split][index], (split, index)
        template = self._contexts[self._teachers.get(prompt.teacher or "", 0)] if self._contexts else None
        if template is None:
            return None
        if key not in self._told:
            self._told[key] = hf.encode_prompt(self.tokenizer, told(prompt, template))
        return self._told[key]

    def _check_teachers(self) -> None:
        for split, prompts in self.prompts.items():
            for p in prompts:
                if p.teacher is not None and self._teachers and p.teacher not in self._teachers:
                    raise UserError(
                        f"task: {split} prompt {p.index} names the teacher {p.teacher!r}; there are {', '.join(self._teachers)}"
                    )

    def prompt(self, sample: SampleId) -> Prompt:
        return self.prompts[sample.split][sample.prompt]

    def token_ids(self, sample: SampleId) -> np.ndarray:
        """int32 (prompt_length,), encoded once."""
        return self.encoded(sample.split, sample.prompt)

    def encoded(self, split: str, index: int) -> np.ndarray:
        key = (split, index)
        if key not in self._ids:
            self._ids[key] = hf.encode_prompt(self.tokenizer, self.prompts[split][index])
        return self._ids[key]

    def largest_id(self, split: str, index: int) -> int:
        """The largest token id of a prompt, as the student or its teacher sees it."""
        seen = [self.encoded(split, index), self._as_told(split, index)]
        return max((int(ids.max()) for ids in seen if ids is not None and len(ids)), default=-1)

    def longest(self, split: str) -> tuple[int, int]:
        """(tokens, index) of the longest prompt of a split, as the student or its teacher sees it."""

        def tokens(index: int) -> int:
            seen = self._as_told(split, index)
            return max(len(self.encoded(split, index)), 0 if seen is None else len(seen))

        return max((tokens(i), i) for i in range(len(self.prompts[split])))


def context_tokens(recipe: Recipe, stream: PromptStream) -> int:
    """Tokens of the longest sample that there can be."""
    new = {"train": recipe.sampler.max_new_tokens, "eval": recipe.eval.max_new_tokens or recipe.sampler.max_new_tokens}
    return max(stream.longest(split)[0] + new[split] for split in new)


def evaluation_ids(recipe: Recipe, stream: PromptStream) -> list[SampleId]:
    """All held-out samples; the same ids, hence the same random numbers, at every version and in `fopd eval`."""
    return [
        SampleId("eval", 0, prompt, replica)
        for prompt in range(len(stream.prompts["eval"]))
        for replica in range(recipe.eval.samples)
    ]


def schedule_config(recipe: Recipe, replicas: int, exclusive: bool, replayable: bool) -> ScheduleConfig:
    """The recipe as the schedule wants it; evaluations before the first step, after the last, and every so often."""
    replay = recipe.freshness.replay
    wanted = POLICIES[recipe.freshness.policy].weights == "freshness" or replay.labels == "current"
    steps, every = recipe.learner.steps, recipe.eval.every
    between = range(every, steps, every) if every else range(0)
    return ScheduleConfig(
        steps=steps, batch=recipe.learner.batch_samples, depth=recipe.schedule.depth, lag=recipe.schedule.lag,
        inflight=recipe.schedule.inflight, replicas=replicas, concurrency=recipe.sampler.concurrency,
        score_batch=tuple(t.batch_samples for t in recipe.teachers), exclusive=exclusive, eval_versions=frozenset({0, steps, *between}),
        replays=math.ceil(replay.share * recipe.learner.batch_samples) if replayable and wanted else 0, replay_lag=replay.min_lag, replay_ahead=replay.labels == "cached",
    )  # fmt: skip
