"""Divergences between the student pi and the teacher p, one number per position.

All take log-probabilities over the same classes, student first: `(..., V)` on the full vocabulary, or `(...,
k + 1)` after `freshness.drift.with_tail` on a top-k support. Convention of the recipe (and of TRL's
`generalized_jsd_loss`):

    forward_kl  KL(p || pi)    jsd with beta 0     mass-covering
    reverse_kl  KL(pi || p)    jsd with beta 1     mode-seeking
    jsd(beta)   beta KL(p || m) + (1 - beta) KL(pi || m),  m = beta p + (1 - beta) pi,  0 < beta < 1

(beta here weighs the *teacher*, as in equation 1 of GKD, arXiv 2306.13649; as beta goes to 0 or 1 the JSD
itself vanishes, so the two ends are defined to be the two KLs, again as TRL does.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import assert_never

import torch
from torch import Tensor

from fopd_cli.freshness.trust import spent
from fopd_cli.names import Advantage, LossKind


def kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) in nats over the last axis, from log-probabilities; 0 log 0 = 0."""
    return torch.where(left == -torch.inf, 0.0, left.exp() * (left - right)).sum(-1)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, 0 < beta < 1, in nats."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def one_name(kind: LossKind, beta: float) -> LossKind:
    """The loss, with the two ends of the JSD named as the KLs that they are."""
    if kind == "jsd" and beta in (0, 1):
        return "reverse_kl" if beta else "forward_kl"
    return kind


# (student, teacher, beta) to nats. A name in `names.LossKind` and an entry here make a loss; the hand-written
# formulas in kernels.py only make some of them faster.
DIVERGENCES: dict[LossKind, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda student, teacher, beta: kl(teacher, student),
    "reverse_kl": lambda student, teacher, beta: kl(student, teacher),
    "jsd": jsd,
}


def divergence(kind: LossKind, student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """The recipe's divergence, `(...)`."""
    return DIVERGENCES[one_name(kind, beta)](student, teacher, beta)


def ratio(student: Tensor, behaviour: Tensor, cap: float | None) -> Tensor:
    """rho = pi_t(y)/pi_r(y) from log-probs `(...)`, at most `cap`."""
    rho = (student - behaviour).exp()
    return rho if cap is None else rho.clamp(max=cap)


def advantage_of(kind: Advantage, student: Tensor, teacher: Tensor, behaviour: Tensor) -> Tensor:
    """log p - log pi of the sampled token, from log-probs `(...)`; `cached` takes log pi from the behaviour
    policy, as it was when y was sampled, `recomputed` from the student as it is now. No gradient.
    """
    match kind:
        case "cached":
            return teacher - behaviour
        case "recomputed":
            return teacher - student.detach()
        case _:
            assert_never(kind)


def policy_gradient(
    student: Tensor,
    teacher: Tensor,
    behaviour: Tensor,
    kind: Advantage,
    importance: bool,
    max_ratio: float | None = None,
    trust: float | None = None,
) -> Tensor:
    """Reverse KL from one sampled token per position: `-(log p - log pi)(y) * log pi_t(y)`, log-probs `(...)`
    of y.

    `importance` multiplies by rho = pi_t(y)/pi_r(y), which makes the gradient that of `E_{pi_t}`, up to a cap
    on rho if there is one; `trust` leaves out tokens that are spent (`freshness/trust.py`). Only the gradient
    is meaningful: the value is not a divergence.
    """
    now = student.detach()
    advantage = advantage_of(kind, now, teacher, behaviour)
    if trust is not None:
        advantage = torch.where(spent(advantage, now - behaviour, trust), 0.0, advantage)
    if importance:
        advantage = advantage * ratio(now, behaviour, max_ratio)
    return -advantage * student
