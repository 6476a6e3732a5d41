"""How much of its devices' peak rate each role used while it computed, and how long the learner stood still.

MFU is model FLOP over what the devices could do in the same seconds: two per parameter and token of a forward
pass, four more of a backward pass. Attention's own products and passes that are computed again are not
counted, so it is a little low for long texts. Idle time is not in it: that is what the busy shares say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fopd_cli.runtime.crew.messages import Span

LEARNER = "learner-0"  # of several ranks the one whose spans are those of all


class Utilization:
    """Of the steps so far. `at_peak`: seconds that a token would take each worker at its devices' peak rate;
    workers without one have no MFU.
    """

    def __init__(self, at_peak: Mapping[str, float]) -> None:
        self._at_peak = at_peak
        self._least: dict[str, float] = defaultdict(float)  # by role, since the last step
        self._seconds: dict[str, float] = defaultdict(float)
        self._published: float | None = None  # when the learner was last done
        self._gap = 0.0

    def worked(self, worker: str, span: Span) -> None:
        if worker == LEARNER and span.name == "train" and self._published is not None:
            self._gap += max(0.0, span.start - self._published)
        if worker == LEARNER and span.name == "publish":
            self._published = span.end
        tokens, a_token = _tokens(span), self._at_peak.get(worker)
        if tokens is not None and a_token is not None:
            role = worker.split("-")[0]
            self._least[role] += tokens * a_token
            self._seconds[role] += span.end - span.start

    def step(self) -> dict[str, Any]:
        """`mfu` by role, of what it computed since the last call, and `gap_seconds`, for which the learner
        waited between two steps. Evaluations are in the gap.
        """
        mfu = {role: self._least[role] / seconds for role, seconds in self._seconds.items() if seconds > 0}
        found = {"mfu": mfu} if mfu else {}
        gap, self._gap = self._gap, 0.0
        self._least.clear()
        self._seconds.clear()
        return {**found, "gap_seconds": gap}


def _tokens(span: Span) -> int | None:
    """Tokens that went through the model in a span."""
    match span.name:
        case "train" | "score":
            return int(span.args["tokens"])
        case "generate":
            return int(span.args["rows"] + span.args["prompt_tokens"])
        case _:
            return None
