"""What a run's own metrics show is going wrong, while there is still time to act. Each warning is given once.

clipping   a threshold that acts at every step guards against nothing: it sets the size of every step. Where
           the gradient shrinks as the student learns, AdamW's steps shrink with it; clipped to one norm, they
           do not, and a rate that was right at the start is too high later (docs/real-pair.md: this, not
           staleness, ruined a run)
climbing   the KL to the teacher on the training samples is far above its lowest
fleeing    the estimate of the KL, a mean of log(student / teacher) over sampled tokens, is far below zero,
           which no fresh samples give: the student has moved away from what it sampled. So a stale policy
           gradient collapses, within ten steps, while the KL on its own new answers falls
           (docs/staleness-details.md: at the end every answer was 32 colons)
repetition most of the remaining KL is at the beginning of answers. The teacher agrees with a student that
           only repeats itself: after ten equal lines it expects the eleventh, and the mean over all tokens
           falls (docs/real-pair.md)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

WINDOW = 20  # optimizer steps
RISEN = 1.3  # times the lowest mean over a window
SMALL_KL = 0.02  # nats per token: below it a rise by a third is noise
UNEVEN = 3.0  # KL of an answer's first quarter over that of its last
FEW = 5  # steps, for what goes wrong fast
FLED = -0.5  # nats per token
FAR = 0.5  # nats per token, in the first quarter: an unsure teacher is this far from any student


class Watch:
    """Sees every optimizer step; a resumed run starts afresh."""

    def __init__(self, clip: float) -> None:
        self._clip = clip
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._kls: deque[float] = deque(maxlen=WINDOW)
        self._quarters: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._lowest = float("inf")
        self._said: set[str] = set()

    def step(self, grad_norm: float, kl: float, quarters: Sequence[float]) -> list[str]:
        """New warnings after this step. `grad_norm` is before clipping, `kl` in nats per token (nan: not
        known), `quarters` the same for each quarter of an answer.
        """
        self._norms.append(grad_norm)
        self._kls.append(kl)
        self._quarters.append(quarters)
        found = {"fleeing": self._fleeing()}
        if len(self._kls) == WINDOW:
            mean = sum(self._kls) / WINDOW
            self._lowest = min(self._lowest, mean)
            found |= {
                "clipping": self._clipping(),
                "climbing": self._climbing(mean),
                "repetition": self._repetition(),
            }
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said |= set(new)
        return list(new.values())

    def _clipping(self) -> str | None:
        if not 0 < self._clip < min(self._norms):
            return None
        return (
            f"learner.clip: all of the last {WINDOW} gradients were clipped to {self._clip:g} (norms "
            f"{min(self._norms):.3g} to {max(self._norms):.3g}): every step has the same size, however "
            "little is left to learn; raise it above them or set it to 0, or lower learner.lr"
        )

    def _climbing(self, mean: float) -> str | None:
        if not mean > max(RISEN * self._lowest, SMALL_KL):
            return None
        return (
            f"the KL to the teacher climbs: {mean:.3g} over the last {WINDOW} steps, {self._lowest:.3g} at "
            "best; lower learner.lr or let it decay (learner.decay: linear); fopd export RUN OUT --step N "
            "takes an earlier checkpoint"
        )

    def _fleeing(self) -> str | None:
        last = list(self._kls)[-FEW:]
        mean = sum(last) / FEW
        if len(last) < FEW or not mean < FLED:
            return None
        return (
            f"the student finds its own samples less likely than the teacher does (log-ratio {mean:.2g} nats "
            f"per token over the last {FEW} steps): it has moved away from what it sampled, and a policy "
            "gradient on stale samples then collapses; use loss.support: full, lower schedule.max_lag or "
            "learner.lr, or raise freshness.anchor; and start from an earlier checkpoint"
        )

    def _repetition(self) -> str | None:
        first, *_, last = np.mean(list(self._quarters), axis=0)
        if not first > max(UNEVEN * last, FAR):
            return None
        return (
            f"most of the remaining KL is at the beginning of answers ({first:.2g} nats per token in their "
            f"first quarter, {last:.2g} in their last): the student may be repeating itself, which the "
            "teacher comes to expect; read some answers (samples.jsonl, or fopd report RUN)"
        )
