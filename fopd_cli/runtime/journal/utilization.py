"""How much of its devices' peak rate each role used while computing, and how long the learner sat idle.

MFU is model FLOP over what the devices could do in the same seconds: two per parameter and token in a forward
pass, four more in a backward pass. Attention's own products and recomputed passes are not counted, so it is a
little low for long texts. Idle time is not included; the busy shares show that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fopd_cli.runtime.crew.messages import Span

LEARNER = "learner-0"  # the rank whose spans stand for all ranks


class Utilization:
    """MFU by role and the learner's gaps. `at_peak`: each worker's seconds per token at its devices' peak
    rate; workers without one have no MFU.
    """

    def __init__(self, at_peak: Mapping[str, float]) -> None:
        self._at_peak = at_peak
        self._least: dict[str, float] = defaultdict(float)  # by role, since the last step
        self._seconds: dict[str, float] = defaultdict(float)
        self._trained: float | None = None  # when the learner's last step ended
        self._gap = 0.0

    def worked(self, worker: str, span: Span) -> None:
        if worker == LEARNER and span.name == "train":
            self._gap += 0.0 if self._trained is None else max(0.0, span.start - self._trained)
            self._trained = span.end
        tokens, a_token = _tokens(span), self._at_peak.get(worker)
        if tokens is not None and a_token is not None:
            role = worker.split("-")[0]
            self._least[role] += tokens * a_token
            self._seconds[role] += span.end - span.start

    def step(self) -> dict[str, Any]:
        """`mfu` by role for what it computed since the last call, and `gap_seconds` that the learner waited
        between two steps. Evaluations count as gap, and so does a publication that it had to wait for.
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
