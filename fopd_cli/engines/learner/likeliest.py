"""What a teacher would rather have written: its likeliest tokens at each position, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fopd_cli.losses.head import Head
from fopd_cli.samples import MOST_PIECES, TeacherTargets

NAMED = 3  # tokens of each position
ROWS = 64  # positions whose logits are made at once


@torch.no_grad()
def likeliest(targets: TeacherTargets, heads: Sequence[Head]) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and probabilities `(n, NAMED)` at a response's first positions, likeliest first, at temperature 1
    from hidden states and as recorded from top-k log-probs. None if the targets are one log-prob a position.
    """
    if targets.topk_logprobs is not None and targets.topk_ids is not None:
        logprobs, at = targets.topk_logprobs[:MOST_PIECES].topk(min(NAMED, targets.topk_logprobs.shape[1]))
        return targets.topk_ids[:MOST_PIECES].gather(-1, at).cpu().numpy(), logprobs.exp().cpu().numpy()
    if targets.hidden is None:
        return None
    found = [_named(rows, heads[targets.teacher]) for rows in targets.hidden[:MOST_PIECES].split(ROWS)]
    ids, probabilities = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return ids, probabilities


def _named(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Ids and probabilities `(rows, NAMED)`."""
    logits = head.logits(hidden.to(head.weight.device))
    logprobs, ids = torch.log_softmax(logits, -1).topk(min(NAMED, logits.shape[-1]))
    return ids, logprobs.exp()
