"""The data that passes between workers: everything that one receives or returns is one of these.

    prompt --> sampler --Rollout--> teacher --TeacherTargets--> learner --SampleStats--> conductor

Indexing convention, used everywhere: a rollout holds `prompt_length + response_length` token ids. Response
position `h` (0-based) is the token `token_ids[prompt_length + h]`; everything that *predicts* it (the
student's hidden state, the teacher's hidden state, both distributions) is read off the forward pass at token
`prompt_length + h - 1`. All per-position arrays below have one row per response position, in that order.

Small arrays are numpy (they are pickled into the queue as bytes; a torch tensor would cost a file descriptor
each). Large ones (teacher targets, weights) are torch views into shared memory, see
`runtime/memory/arena.py`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import torch

from fopd_cli.names import TargetKind

MOST_PIECES = 512  # tokens of a response that people are told one by one; each piece decodes all before it


@dataclass(frozen=True)
class PerToken:
    """An array of a rollout with a row per response token; `unsampled` fills the rows of tokens that no
    student sampled. Episodes, checkpoints and samplers need to know nothing else about it.
    """

    unsampled: float


@dataclass(frozen=True)
class Prompt:
    """One question. `payload` (the reference answer, say) is for the grader and is never shown to the
    student.
    """

    index: int
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    payload: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None  # name of the teacher that judges it; None: the first
    tools: list[dict[str, Any]] = field(default_factory=list)  # for the chat template, in JSON schema
    place: str | None = None  # the row of the user's file that it comes from, for errors
    held_out: str | None = None  # name of the held-out set that it belongs to; None: there is only one

    @property
    def where(self) -> str:
        """Its name in errors."""
        return self.place or f"prompt {self.index}"


def seed_of(seed: int, what: str) -> int:
    """63-bit seed of one thing's own random numbers, whatever else draws from `seed`."""
    digest = hashlib.blake2b(f"{seed}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, order=True)
class SampleId:
    """What identifies a sample: `repeat` counts the samples of a prompt in an epoch, `attempt` its
    regenerations.
    """

    split: Literal["train", "eval"]
    epoch: int
    prompt: int
    repeat: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.split}/e{self.epoch}/p{self.prompt}/s{self.repeat}/a{self.attempt}"

    def seed(self, run_seed: int) -> int:
        """63-bit seed of this sample's random numbers; depends only on the run's seed and the id."""
        return seed_of(run_seed, str(self))


@dataclass(frozen=True)
class SamplingParams:
    """How the student samples. Behaviour log-probs are those of the distribution that this describes."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    keep_topk: int = 0  # behaviour log-probs of the k likeliest tokens; -1: of the whole vocabulary
    draws: int = 1  # tokens drawn per position, the response's own included


@dataclass(frozen=True)
class Request:
    """One generation requested from a sampler."""

    key: int  # the schedule's ticket number, echoed in the answer
    token_ids: np.ndarray  # int32 (prompt_length,)
    seed: int
    params: SamplingParams


@dataclass(frozen=True)
class Context:
    """What a teacher reads to judge a rollout. It differs from what the student saw if the teacher is told
    more (`teacher.context`), or if the environment would answer differently by now (`freshness.reexecute`).
    """

    token_ids: np.ndarray  # int32 (m,)
    # int64 (n,): index in `token_ids` of the token at response position h; -1: not there
    positions: np.ndarray


@dataclass
class Rollout:
    """A finished generation. `response` arrays have `n` rows, one per sampled token (EOS included)."""

    key: int
    token_ids: np.ndarray  # int32 (prompt_length + n,)
    prompt_length: int
    # bool (n,): sampled by the student, hence loss-bearing
    loss_mask: Annotated[np.ndarray, PerToken(False)]
    # float32 (n,): log pi_r(y), nan if the sampler gave none
    logprobs: Annotated[np.ndarray, PerToken(np.nan)]
    spans: list[tuple[int, int, int]]  # (version, start, end) over response positions, contiguous
    finish: Literal["stop", "length"]
    topk_logprobs: Annotated[np.ndarray | None, PerToken(0)] = None  # float32 (n, k)
    # int32 (n, k); None: the whole vocabulary in id order
    topk_ids: Annotated[np.ndarray | None, PerToken(0)] = None
    # int32 (n, draws - 1): drawn from pi_r besides the response's own token
    draw_ids: Annotated[np.ndarray | None, PerToken(0)] = None
    # float32 (n, draws - 1): log pi_r of these
    draw_logprobs: Annotated[np.ndarray | None, PerToken(0)] = None
    # response positions of each turn of an episode
    turns: list[tuple[int, int]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)  # what an episode's environment executed
    # tokens sampled with keys and values of an older version than their own; None: never any
    stale_kv: int | None = None
    answer: str | None = None  # what is graded, if an episode's environment sets it; None: the last turn
    context: Context | None = None  # None: what the student saw. Rebuilt for each scoring, never saved

    @property
    def judged(self) -> Context:
        """The context to score on."""
        return self.context or Context(self.token_ids, np.arange(self.prompt_length, len(self.token_ids)))

    @property
    def response_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def response_ids(self) -> np.ndarray:
        return self.token_ids[self.prompt_length :]

    @property
    def last_turn(self) -> np.ndarray:
        """Token ids of what is graded: the last turn of an episode, else the whole response."""
        start, stop = self.turns[-1] if self.turns else (0, self.response_length)
        return self.response_ids[start:stop]

    @property
    def oldest_version(self) -> int:
        return min(version for version, _, _ in self.spans)


# The arrays of a rollout that have a row for each response token.
PER_TOKEN: dict[str, PerToken] = {
    name: found
    for name, hint in get_type_hints(Rollout, include_extras=True).items()
    for found in getattr(hint, "__metadata__", ())
    if isinstance(found, PerToken)
}


@dataclass(frozen=True)
class TargetSpec:
    """The shape of one sample's teacher targets: what the teacher writes and the learner reads."""

    kind: TargetKind
    width: int  # hidden size, k, or 1
    dtype: torch.dtype  # of hidden states; log-probs are float32, ids int32
    reexecuted: bool = False  # calls may be executed again, which adds `drift` and `aligned`

    def fields(self, positions: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of each array, in memory order."""
        found: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        if self.reexecuted:
            found.append(("drift", torch.float32, (positions,)))
            found.append(("aligned", torch.int32, (positions,)))
        if self.kind == "hidden":
            return [*found, ("hidden", self.dtype, (positions, self.width))]
        found.append(("logprobs", torch.float32, (positions,)))
        if self.kind == "topk":
            found.append(("topk_logprobs", torch.float32, (positions, self.width)))
            found.append(("topk_ids", torch.int32, (positions, self.width)))
        return found

    def nbytes(self, positions: int) -> int:
        return sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.fields(positions))


@dataclass
class TeacherTargets:
    """What the frozen teacher said about one rollout.

    `hidden` (n, teacher width): post-norm hidden states; the learner holds the teacher's head and recomputes
    exact logits. `logprobs` (n,): log p(y) of the sampled tokens. `topk_logprobs`, `topk_ids` (n, k): the
    likeliest tokens. After a re-execution `drift` (n,) is KL(p(.|now) || p(.|labelled)) in nats, and
    `aligned` (n,) 0 where the current context has no such position; the labels are still those of the first
    context, or of the current one (`freshness.reexecute.labels`). `teacher` is that teacher's number.
    """

    kind: TargetKind
    hidden: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    topk_logprobs: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    aligned: torch.Tensor | None = None
    teacher: int = 0


@dataclass
class Sample:
    """A rollout with its labels, as the learner consumes it at optimizer step `t`; `lag` is tau = t - r."""

    rollout: Rollout
    targets: TeacherTargets
    lag: int


@dataclass
class SampleStats:
    """Per-sample results of one learner pass, means over loss-bearing tokens; one entry per sample, in batch
    order.
    """

    keys: np.ndarray  # int64
    lag: np.ndarray  # int64, optimizer steps
    length: np.ndarray  # int64, loss-bearing tokens
    loss: np.ndarray  # float64, l_i in nats per token
    kl: np.ndarray  # float64, KL(pi_t || p), or its estimate on the given support
    forward_kl: np.ndarray  # float64, KL(p || pi_t), nan where the support cannot tell
    entropy: np.ndarray  # float64, nats; nan where the support cannot tell
    # float64 (samples, 4), `kl` over the first .. last quarter of the response; nan: no token there
    kl_quartiles: np.ndarray
    # float64, the student's probability of the teacher's top-k; 1: full support, nan: sampled or mc
    student_mass: np.ndarray
    teacher_mass: np.ndarray  # float64, the teacher's own
    clamped: np.ndarray  # float64 in [0, 1], share of terms at a limit (importance ratio, drift, top-k tail)
    drift_roll: np.ndarray  # float64, D_roll_i before the noise floor is subtracted
    drift_sup: np.ndarray  # float64
    coverage_roll: np.ndarray  # float64 in [0, 1]
    coverage_sup: np.ndarray  # float64 in [0, 1]
    freshness: np.ndarray  # float64, f_i
    weight: np.ndarray  # float64, the policy's weight before normalisation
    # object: `kl` of each loss-bearing token, float32 (length,), of measured samples; None of trained ones
    token_kl: np.ndarray
    # object: the teacher's likeliest ids and their probabilities, each (positions, some), of those measured
    # samples of which they were asked for; else None
    likeliest: np.ndarray


@dataclass
class StepReport:
    """The learner's report on optimizer step `step`; the student's version afterwards is `step + 1`."""

    step: int
    stats: SampleStats
    loss: float  # the minimised objective, weights and anchor included
    anchor: float  # mean_i w_i D_roll_i, unscaled by lambda
    grad_norm: float  # before clipping
    clipped: bool
    lr: float
    skipped: bool  # every weight was zero: no update was made
    noise_floor: float
    tokens: int  # tokens in the forward pass, excluding padding
    padded_tokens: int  # with padding

    @property
    def drift_above_floor(self) -> np.ndarray:
        """float64 (samples,): D_roll_i minus the noise floor, never below 0."""
        return np.maximum(self.stats.drift_roll - self.noise_floor, 0.0)
