"""A teacher whose special tokens have different ids from the student's. It is asked in its own ids and
answers in the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.protocols import Teacher
from fopd_cli.engines.text.vocabularies import exchanged, inverse
from fopd_cli.losses.head import Head
from fopd_cli.samples import Rollout, TeacherTargets


class RenumberedTeacher:
    """Implements `protocols.Teacher` around another one. `table` int32 (vocab,): the student's id -> the
    teacher's.
    """

    def __init__(self, teacher: Teacher, table: np.ndarray) -> None:
        self.teacher, self.table, self.back = teacher, table, torch.from_numpy(inverse(table))

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        self.teacher.score([self._asked(r) for r in rollouts], targets)
        for target in targets:
            if target.topk_ids is not None:
                target.topk_ids.copy_(self.back[target.topk_ids.long()])

    def head(self) -> Head | None:
        found = self.teacher.head()
        return None if found is None else renumbered_head(found, self.table)

    def sleep(self) -> None:
        self.teacher.sleep()

    def wake(self) -> None:
        self.teacher.wake()

    def _asked(self, rollout: Rollout) -> Rollout:
        context = rollout.judged
        changes: dict[str, Any] = {"token_ids": exchanged(rollout.token_ids, self.table)}
        if rollout.topk_ids is not None:
            changes["topk_ids"] = self.table[rollout.topk_ids]
        elif rollout.topk_logprobs is not None:  # over the whole vocabulary, in id order
            changes["topk_logprobs"] = rollout.topk_logprobs[:, self.back.numpy()]
        return replace(
            rollout, context=replace(context, token_ids=exchanged(context.token_ids, self.table)), **changes
        )


def renumbered_head(head: Head, table: np.ndarray) -> Head:
    """A teacher's head with `vocab` rows, in the order of the student's ids."""
    rows = torch.from_numpy(table).long().to(head.weight.device)
    return replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])
