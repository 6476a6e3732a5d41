"""How fast engines run when they share a device or the CPU cores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.placement import Plan


@dataclass(frozen=True)
class Place:
    """Where an engine runs: its devices, or its CPU threads (None: all cores, divided by need), and in how
    many processes. `remote`: on a server that nothing else uses.
    """

    devices: frozenset[int]
    threads: int | None
    processes: int
    remote: bool = False


def places(plan: Plan, remote: Collection[int] = ()) -> dict[Engine, Place]:
    """The places of all engines of a plan; `remote` are the indices of teachers on servers."""
    groups = {
        Engine("learner"): plan.learners,
        **{Engine("teacher", i): ranks for i, ranks in enumerate(plan.teachers)},
        **{Engine("sampler", i): (spec,) for i, spec in enumerate(plan.samplers)},
    }
    return {
        engine: Place(
            frozenset(d for spec in specs for d in spec.devices),
            specs[0].threads,
            len(specs),
            engine.role == "teacher" and engine.index in remote,
        )
        for engine, specs in groups.items()
    }


def usual_spread(plan: Plan) -> float:
    """The spread if no run has measured it: 0.5 if any engine's threads are divided by need, else 0."""
    return 0.5 if any(spec.threads is None for spec in plan.everyone) else 0.0


@dataclass(frozen=True)
class Contention:
    """The rate of each working engine; 1 means it has its devices, or the whole machine, to itself.

    Engines that use a device at once share it equally. On a CPU, an engine with 1/c of the running threads
    works at the rate c ** -spread. The spread is 1 where cores are divided and all count the same, and 0
    where neighbors do not matter. It is in between for small models, which gain little from a second thread,
    and for cores that share caches. If there are more threads than cores, they take turns.
    """

    places: Mapping[Engine, Place]
    cores: int
    spread: float = 1.0

    def rates(
        self, working: Collection[Engine], asleep: Collection[Engine] = (), others: int = 0
    ) -> dict[Engine, float]:
        """`asleep` are working engines that wait inside a call. They use no cores, but keep their share where
        cores are divided by need. `others`: threads that run beside the engines.
        """
        known = {e: self.places[e] for e in working if e in self.places}
        on_cpu = {e: p for e, p in known.items() if not p.devices and not p.remote}
        claims = sum(p.processes for p in on_cpu.values() if p.threads is None)
        threads = {
            e: p.processes * (max(1.0, self.cores / claims) if p.threads is None else p.threads)
            for e, p in on_cpu.items()
        }
        used = others + sum(n for e, n in threads.items() if e not in asleep or on_cpu[e].threads is None)
        running = others + sum(n for e, n in threads.items() if e not in asleep)
        found = {}
        for engine, place in known.items():
            if place.remote:
                found[engine] = 1.0
            elif place.devices:
                sharers = (sum(d in p.devices for p in known.values()) for d in place.devices)
                found[engine] = 1 / max(sharers)
            else:
                crowd = max(1.0, min(used / threads[engine], self.cores))
                found[engine] = crowd**-self.spread * min(1.0, self.cores / max(running, 1e-9))
        return found
