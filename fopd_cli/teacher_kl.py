"""The KL to the teacher on responses that were sampled before: what `fopd eval` reports if nothing can be
graded.

It is computed in a separate process by the run's own teacher and learner, so that it agrees with the run's
evaluation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fopd_cli import doctor
from fopd_cli.errors import UserError
from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import Placement, Recipe
from fopd_cli.runtime.build import Setup, build_learner, build_teacher
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.placement import cuda_devices, place
from fopd_cli.runtime.scheduling.prompts import PromptStream, context_tokens
from fopd_cli.runtime.weights.transport import Shared
from fopd_cli.samples import Rollout, Sample, SampleId
from fopd_cli.tasks.replay import judged_context

GROUP_BYTES = 1 << 30  # of teacher targets at a time
WAIT_S = 3600.0


class Measured(NamedTuple):
    """One row's KL(student || teacher) in nats, the mean over `tokens` tokens."""

    number: int
    kl: float
    tokens: int


def teacher_kl(model: str, recipe: Recipe, rows: list[dict[str, Any]]) -> Iterator[Measured]:
    """Measure rows of `fopd eval`, which must hold their token ids."""
    spec = WorkerSpec("judge", 0, 1, tuple(range(cuda_devices())), torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="fopd-eval-") as logs, Fleet(Path(logs), WAIT_S, WAIT_S) as fleet:
        fleet.start(spec, judging_main, measuring(model, recipe), rows, Path(logs))
        left = len(rows)
        while left:
            for _, message in fleet.receive(timeout=0.5):
                if isinstance(message, Measured):
                    left -= 1
                    yield message


def measuring(model: str, recipe: Recipe) -> Recipe:
    """The recipe with this model as its student, on the devices of one process, and a loss that needs only
    tokens.
    """
    loss: dict[str, Any] = {"student_k": 0}
    if recipe.support == "mc":
        loss["support"] = "full"
    return recipe.model_copy(
        update={
            "student": recipe.student.model_copy(update={"model": model, "lora": None}),
            "placement": Placement(),
            "loss": recipe.loss.model_copy(update=loss),
            "freshness": recipe.freshness.model_copy(update={"policy": "async", "drift": "sampled"}),
            "learner": recipe.learner.model_copy(update={"compile": False, "offload": False}),
        }
    )


def judging_main(
    spec: WorkerSpec, mailbox: Mailbox, recipe: Recipe, rows: list[dict[str, Any]], folder: Path
) -> None:
    """The worker: one group of rows after another, with teacher and learner taking turns on the device."""
    inputs = load_inputs(recipe, place(recipe, len(spec.devices)))
    for finding in doctor.of_pairs(inputs):
        if finding.level == "error":
            raise UserError(f"{finding.what}; {finding.cure}")
    stream, specs = inputs.stream, inputs.target_specs
    setup = Setup(
        recipe,
        inputs.vocab,
        specs,
        inputs.tables,
        context_tokens(recipe, stream, judged=False),
        context_tokens(recipe, stream, judged=True),
        torch.empty(0),
        Shared(WeightChannel.create([])),
        folder / "rendezvous",
    )
    engines: list[Any] = []
    for index in range(len(recipe.teachers)):
        engines.append(
            build_teacher(
                WorkerSpec("teacher", 0, 1, spec.devices[:1], spec.threads, index=index), setup, mailbox.beat
            )
        )
        _rest(spec, engines[-1])
    learner = build_learner(WorkerSpec("learner", 0, 1, spec.devices[:1], spec.threads), setup, mailbox.beat)
    _rest(spec, learner)
    mailbox.send(m.Ready())
    for group in _groups(rows, max(s.nbytes(1) for s in specs)):
        samples = []
        for row in group:
            rollout, number = _rollout(row, stream)
            length = rollout.response_length
            memory = torch.zeros(specs[number].nbytes(length), dtype=torch.uint8)
            samples.append(Sample(rollout, targets_at(memory, 0, specs[number], length, number), lag=0))
        for number, engine in enumerate(engines):
            own, size = (
                [s for s in samples if s.targets.teacher == number],
                recipe.teachers[number].batch_samples,
            )
            with _Turn(spec, engine):
                for i in range(0, len(own), size):
                    part = own[i : i + size]
                    engine.score([s.rollout for s in part], [s.targets for s in part])
                    mailbox.beat()
        with _Turn(spec, learner):
            stats = learner.evaluate(samples)
        for measured in zip(stats.keys.tolist(), stats.kl.tolist(), stats.length.tolist(), strict=True):
            mailbox.send(Measured(*measured))
    while not isinstance(mailbox.receive(block=True), m.StopCommand):
        pass


def _rest(spec: WorkerSpec, engine: Any) -> None:
    if spec.devices:
        engine.sleep()


class _Turn:
    """An engine's turn on the device; without a device, all engines stay awake."""

    def __init__(self, spec: WorkerSpec, engine: Any) -> None:
        self.spec, self.engine = spec, engine

    def __enter__(self) -> None:
        if self.spec.devices:
            self.engine.wake()

    def __exit__(self, *_: Any) -> None:
        _rest(self.spec, self.engine)


def _groups(rows: Iterable[dict[str, Any]], token_bytes: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    tokens = 0
    for row in rows:
        if group and (tokens + row["tokens"]) * token_bytes > GROUP_BYTES:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += row["tokens"]
    if group:
        yield group


def _rollout(row: dict[str, Any], stream: PromptStream) -> tuple[Rollout, int]:
    """A row as it was sampled, with what its teacher reads, and the number of that teacher."""
    sample = SampleId("eval", 0, row["prompt_index"], row["sample"])
    asked, told = stream.token_ids(sample), stream.told(sample)
    ids = np.asarray(row["token_ids"], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in row["turns"] or [(0, len(ids))]:
        mask[start:stop] = True
    rollout = Rollout(
        key=row["number"],
        token_ids=np.concatenate([asked, ids]),
        prompt_length=len(asked),
        loss_mask=mask,
        logprobs=np.full(len(ids), np.nan, dtype=np.float32),
        spans=[(0, 0, len(ids))],
        finish=row["finish"],
        turns=[(start, stop) for start, stop in row["turns"]],
    )
    rollout.context = None if told is None else judged_context(rollout, told)
    return rollout, stream.teacher(sample)
