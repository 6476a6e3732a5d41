"""Which lost engines are restarted, how often, and when none is left. This only counts; `processes.py` acts.

A sampler replica, the grader and the environment are engines of one process; a teacher's ranks compute
together and are restarted together. A learner is never restarted here: its state is in the checkpoint, and
`fopd resume` goes on from it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.placement import Plan

REPLACEABLE = ("sampler", "teacher", "grader", "environment")


class Restarts:
    """At most `limit` restarts of each engine."""

    def __init__(self, plan: Plan, limit: int) -> None:
        self.plan, self.limit = plan, limit
        self._restarts: Counter[str] = Counter()  # by name of the engine's first rank
        self._missing: Counter[str] = Counter()  # its ranks that are not ready yet
        self._gone: set[str] = set()

    def ranks(self, spec: WorkerSpec) -> tuple[WorkerSpec, ...]:
        """All processes of the engine that a process belongs to."""
        return self.plan.teachers[spec.index] if spec.role == "teacher" else (spec,)

    def known(self, spec: WorkerSpec) -> bool:
        """Whether this loss was counted already, with another rank of the same engine."""
        return spec.restarts < self._restarts[self._name(spec)]

    def again(self, spec: WorkerSpec) -> list[WorkerSpec]:
        """The processes to start instead; none if the engine has used up its restarts."""
        name = self._name(spec)
        self._restarts[name] += 1
        if self._restarts[name] > self.limit:
            self._gone.add(name)
            return []
        ranks = [replace(s, restarts=self._restarts[name]) for s in self.ranks(spec)]
        self._missing[name] = len(ranks)
        return ranks

    def nobody_left(self, role: str) -> bool:
        """Whether the run cannot go on: all samplers are gone, or any other engine is."""
        if role == "sampler":
            return all(s.name in self._gone for s in self.plan.samplers)
        return bool(self._gone)

    def ready(self, spec: WorkerSpec) -> bool:
        """A restarted process is ready; True if it is the engine's last one."""
        name = self._name(spec)
        self._missing[name] -= 1
        return self._missing[name] <= 0

    def count(self, spec: WorkerSpec) -> int:
        """How often its engine was lost."""
        return self._restarts[self._name(spec)]

    def _name(self, spec: WorkerSpec) -> str:
        return self.ranks(spec)[0].name
