"""Several ranks that answer as one."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from fopd_cli.runtime.crew import messages as m


class Calls:
    """The commands that an engine of `ranks` processes has not answered in full, the oldest first. Each rank
    answers all of them, in order.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._open: deque[dict[int, m.Answer]] = deque()

    def asked(self) -> None:
        self._open.append({})

    def answered(self, rank: int, answer: m.Answer) -> m.Answer | None:
        """The engine's answer, once the last rank has answered; else None."""
        call = next(answers for answers in self._open if rank not in answers)
        call[rank] = answer
        if len(call) < self._ranks:
            return None
        self._open.popleft()  # the oldest is always complete first
        return _as_one([call[rank] for rank in range(self._ranks)])

    def clear(self) -> None:
        """The engine is lost; no more answers will come."""
        self._open.clear()


def _as_one(answers: list[m.Answer]) -> m.Answer:
    """Rank 0's answer counts. If one rank could not write its part of a checkpoint, the save failed; else
    the files of all ranks are its files. A version is published when all its parts are.
    """
    published = [a for a in answers if isinstance(a, m.Published)]
    if published:
        spans, first = [p.span for p in published], published[0]
        whole = replace(first.span, start=min(s.start for s in spans), end=max(s.end for s in spans))
        return m.Published(first.version, sum(p.nbytes for p in published), whole)
    saved = [a for a in answers if isinstance(a, m.Saved)]
    if not saved:
        return answers[0]
    error = next((s.error for s in saved if s.error), None)
    extra = next((s.extra for s in saved if s.extra), {})
    files = {name: entry for s in saved for name, entry in s.files.items()}
    return m.Saved(extra, saved[0].span, error, files)
