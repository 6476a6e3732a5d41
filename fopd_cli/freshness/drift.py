"""How far the student (D_roll) and the teacher's context (D_sup) moved since a sample was made.

    D_roll_i = mean_h KL( pi_t(.|x_ih) || pi_r(.|x_ih) )          the student now, and when it sampled
    D_sup_i  = mean_h KL( p(.|c_ih now) || p(.|c_ih labelled) )   the frozen teacher, in both contexts

The mean runs over the sample's aligned, loss-bearing positions. Each estimator below returns one KL per
position, in nats, differentiable in its first argument; `per_sample` takes the mean and the coverage.

A sampler and a learner that hold the *same* weights still compute slightly different numbers. `NoiseFloor`
measures that at tau = 0, to be subtracted so that fresh samples do not look stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fopd_cli.tensors import log1mexp


def exact(new: Tensor, old: Tensor) -> Tensor:
    """KL(new || old) from full log-probabilities `(..., V)`; shape `(...)`."""
    # exp(-inf) * (-inf - x) would be nan where the new policy has no mass at all.
    terms = torch.where(new == -torch.inf, 0.0, new.exp() * (new - old))
    return terms.sum(-1)


def topk(new: Tensor, old: Tensor) -> Tensor:
    """KL over k + 1 classes: `(..., k)` log-probs at the same k ids, and one tail class with the remaining
    mass.

    A lower bound of the exact KL (merging classes can only lose divergence), tight as k grows.
    """
    return exact(with_tail(new), with_tail(old))


def overlap(new: Tensor, new_ids: Tensor, old: Tensor, old_ids: Tensor) -> Tensor:
    """KL over the classes that two top-k sets `(n, k)` share, and one tail class; `(n,)`.

    Like `topk`, a lower bound of the exact KL, for an engine that reports only its own likeliest tokens:
    classes that only one of the two names go into the tail.
    """
    same = old_ids[:, :, None] == new_ids[:, None, :]
    both = same.any(-1)
    matched = torch.where(same, new[:, None, :], -torch.inf).amax(-1)
    return topk(torch.where(both, matched, -torch.inf), torch.where(both, old, -torch.inf))


MAX_LOG_RHO = 60.0  # e^60 is far past any drift whose score is not 0, and finite in float32


def sampled(new: Tensor, old: Tensor) -> Tensor:
    """`rho log rho - rho + 1`, `rho = pi_t(y)/pi_r(y)`, from log-probs `(...)` of the sampled token `y ~
    pi_r`.

    Non-negative, and unbiased for KL(pi_t || pi_r): E[rho log rho] is that KL and E[rho] = 1 under pi_r.
    """
    log_rho = (new - old).clamp(max=MAX_LOG_RHO)  # finite, so that a weight of 0 still silences it
    rho = log_rho.exp()
    return rho * log_rho - rho + 1


def quadratic(new: Tensor, old: Tensor) -> Tensor:
    """`(log rho)^2 / 2`, from log-probs `(...)` of the sampled token `y ~ pi_r`.

    The KL to second order in the distance between the two policies (Schulman's k2), with less variance than
    `sampled`. What matters more is its gradient with respect to log pi_t(y), log rho: it grows with distance
    in both directions, while that of `sampled`, rho log rho, goes to 0 for a token that the student has all
    but given up. An anchor must still pull there (docs/staleness.md).
    """
    return 0.5 * (new - old).clamp(max=MAX_LOG_RHO).square()


# The estimators that need only the sampled token.
ONE_TOKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sampled": sampled, "quadratic": quadratic}
# Their derivatives by log pi_t(y), from log rho. Autograd differentiates those without an entry.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sampled": lambda log_rho: log_rho.exp() * log_rho,
    "quadratic": lambda log_rho: log_rho,
}


def slope(kind: str, new: Tensor, old: Tensor) -> Tensor:
    """The derivative by log pi_t(y) of an estimator in `SLOPES`, `(...)`; 0 at its limit."""
    log_rho = (new - old).clamp(max=MAX_LOG_RHO)
    return torch.where(log_rho < MAX_LOG_RHO, SLOPES[kind](log_rho), 0.0)


def at_limit(new: Tensor, old: Tensor) -> Tensor:
    """1 where a `ONE_TOKEN` estimator is at its limit, `(...)`."""
    return ((new - old) > MAX_LOG_RHO).to(old.dtype)


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log of the mass that `(..., k)` leaves over: `(..., k + 1)`."""
    # Rounding can push the kept mass to 1 or past it; the tail is then the smallest that the dtype can tell
    # from 0.
    kept = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=_largest_kept(logprobs))
    return torch.cat([logprobs, log1mexp(kept)], -1)


def tail_at_limit(new: Tensor, old: Tensor) -> Tensor:
    """1 where one of the two tails is no longer known, only bounded: `(..., k)` -> `(...)`."""
    kept = [torch.logsumexp(logprobs, -1) >= _largest_kept(logprobs) for logprobs in (new, old)]
    return (kept[0] | kept[1]).to(new.dtype)


def _largest_kept(logprobs: Tensor) -> float:
    return -torch.finfo(logprobs.dtype).eps


def per_sample(
    drift: Tensor, aligned: Tensor, loss_bearing: Tensor, sample: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Mean drift and coverage of each sample, `(count,)` each, from one row per position.

    `aligned` and `loss_bearing` are bool, `sample` holds the index of each position's sample. Coverage is the
    share of loss-bearing positions that are aligned; a sample with none aligned has drift 0 and coverage 0
    (its score is 0).
    """
    used = aligned & loss_bearing
    zeros = torch.zeros(count, dtype=drift.dtype, device=drift.device)
    total = zeros.index_add(0, sample, torch.where(used, drift, 0.0))
    n_used = zeros.detach().index_add(0, sample, used.to(drift.dtype))
    n_loss = zeros.detach().index_add(0, sample, loss_bearing.to(drift.dtype))
    return total / n_used.clamp(min=1), n_used / n_loss.clamp(min=1)


@dataclass
class NoiseFloor:
    """Running mean of D_roll over samples of lag 0, where only numerics differ. Saved with the checkpoint."""

    value: float = 0.0
    samples: int = 0
    memory: int = 512  # after this many samples the mean forgets old ones at the rate 1/memory

    def update(self, drift_roll: list[float]) -> None:
        """Add the D_roll of some samples of lag 0."""
        for drift in drift_roll:
            self.samples += 1
            self.value += (drift - self.value) / min(self.samples, self.memory)

    def subtract(self, drift_roll: Tensor) -> Tensor:
        """D_roll above the floor, never below 0."""
        return (drift_roll - self.value).clamp(min=0)
