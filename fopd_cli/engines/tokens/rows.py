"""A rollout while it grows, token by token: what every sampler keeps for a running request."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fopd_cli.samples import Request, Rollout


@dataclass
class Row:
    """One running request. `append` once a token; `rollout` when it has ended."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # By the names of `Rollout`'s arrays, a row a token: what the sampler was asked for beside the tokens.
    extras: defaultdict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def append(self, token: int, logprob: float, version: int) -> None:
        """A token sampled by `version`; the first one of another version opens a span."""
        n = len(self.ids)
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.spans and self.spans[-1][0] == version:
            self.spans[-1] = (version, self.spans[-1][1], n + 1)
        else:
            self.spans.append((version, n, n + 1))

    def rollout(self, finish: Literal["stop", "length"]) -> Rollout:
        prompt = self.request.token_ids
        extras: dict[str, Any] = {name: np.stack(rows) for name, rows in self.extras.items()}
        return Rollout(
            key=self.request.key,
            token_ids=np.concatenate([prompt, np.asarray(self.ids, dtype=np.int32)]),
            prompt_length=len(prompt),
            loss_mask=np.ones(len(self.ids), dtype=bool),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            spans=self.spans,
            finish=finish,
            **extras,
        )
