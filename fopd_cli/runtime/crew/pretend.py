"""Engines that do no work: they show what a run would do, and when, given only the costs of its commands.

For tests and plans. Responses have a length and no content. Every grade is 0. Environments end an episode
after its first turn, and contexts never change. Nothing here says anything about learning.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import assert_never

import numpy as np

from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.samples import Request, Rollout, SampleStats, StepReport

NOW = m.Span("pretend", 0.0, 0.0, {"ms": 0.0, "gb_per_s": 0.0})
QUARTERS = 4


def any_length(request: Request) -> int:
    """Any that the request allows, drawn from its own seed."""
    return random.Random(request.seed).randint(1, request.params.max_new_tokens)


class Pretend:
    """See `Engines` in `inprocess.py`. `length` gives each response's number of tokens."""

    def __init__(self, length: Callable[[Request], int] = any_length) -> None:
        self._length = length
        self._loaded: dict[Engine, int] = {}

    def close(self) -> None: ...

    def do(self, engine: Engine, command: m.Command) -> Sequence[m.Answer]:
        match command:
            case m.GenerateCommand(requests):
                version = self._loaded[engine]
                return [m.Sampled([_response(r, version, self._length(r))], [], 0) for r in requests]
            case m.LoadCommand(version):
                self._loaded[engine] = version
                return [m.Loaded(version, NOW)]
            case m.ScoreCommand(rollouts):
                return [m.Scored([rollout.key for rollout in rollouts], NOW)]
            case m.TrainCommand(step, rollouts, _, lags):
                return [m.Trained(_report(step, rollouts, lags), NOW), m.Published(step + 1, 0, NOW)]
            case m.EvaluateCommand(rollouts, _, lags):
                return [m.Evaluated(_stats(rollouts, lags), NOW)]
            case m.SaveCommand():
                return [m.Staged(NOW), m.Saved({}, NOW)]
            case m.GradeCommand(items):
                return [m.Graded([(key, 0.0, {}) for key, _, _ in items], NOW)]
            case m.TurnCommand(key, episode):
                return [m.Observed(key, episode, None, [], None, NOW)]
            case m.ReexecuteCommand(rollout):
                return [m.Reexecuted(rollout.key, None, NOW)]
            case m.AbortCommand() | m.CancelCommand():
                return []
            case _:
                assert_never(command)


def _response(request: Request, version: int, length: int) -> Rollout:
    return Rollout(
        key=request.key,
        token_ids=np.concatenate([request.token_ids, np.zeros(length, np.int32)]),
        prompt_length=len(request.token_ids),
        loss_mask=np.ones(length, dtype=bool),
        logprobs=np.zeros(length, np.float32),
        spans=[(version, 0, length)],
        finish="stop" if length < request.params.max_new_tokens else "length",
    )


def _stats(rollouts: Sequence[Rollout], lags: Sequence[int]) -> SampleStats:
    zeros, ones = np.zeros(len(rollouts)), np.ones(len(rollouts))
    lag = np.array(lags, dtype=np.int64)
    return SampleStats(
        keys=np.array([rollout.key for rollout in rollouts], dtype=np.int64),
        lag=lag,
        length=np.array([rollout.response_length for rollout in rollouts], dtype=np.int64),
        loss=zeros,
        kl=zeros,
        forward_kl=zeros,
        entropy=zeros,
        kl_quartiles=np.zeros((len(rollouts), QUARTERS)),
        student_mass=ones,
        teacher_mass=ones,
        clamped=zeros,
        drift_roll=zeros,
        drift_sup=zeros,
        coverage_roll=ones,
        coverage_sup=ones,
        freshness=1 / (lag + 1),
        weight=ones,
        token_kl=np.full(len(rollouts), None, dtype=object),
        likeliest=np.full(len(rollouts), None, dtype=object),
    )


def _report(step: int, rollouts: Sequence[Rollout], lags: Sequence[int]) -> StepReport:
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return StepReport(
        step=step,
        stats=_stats(rollouts, lags),
        loss=0.0,
        anchor=0.0,
        grad_norm=0.0,
        clipped=False,
        lr=0.0,
        skipped=False,
        noise_floor=0.0,
        tokens=tokens,
        padded_tokens=tokens,
    )
