"""How fast engines work that share a device or the cores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.placement import Plan


@dataclass(frozen=True)
class Place:
    """Where an engine works: its devices, or threads on the CPU (None: all cores, by need), in so many
    processes. `remote`: on a server, which it shares with nobody.
    """

    devices: frozenset[int]
    threads: int | None
    processes: int
    remote: bool = False


def places(plan: Plan, remote: Collection[int] = ()) -> dict[Engine, Place]:
    """Of all engines of a plan; `remote` are the numbers of teachers on servers."""
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
    """Where no run has measured it: threads that are divided by need are missed, neighbours hardly felt."""
    return 0.5 if any(spec.threads is None for spec in plan.everyone) else 0.0


@dataclass(frozen=True)
class Contention:
    """The rate of each working engine, where 1 is alone on its devices, or alone on the machine.

    Devices that several use at once are shared equally. On a CPU an engine whose threads are 1/c of those
    that run works at the rate c ** -spread: 1 where cores are divided and each is worth the same, 0 where
    neighbours do not matter, and in between with small models, whom a second thread helps little, and with
    cores that share caches. More threads than cores take turns.
    """

    places: Mapping[Engine, Place]
    cores: int
    spread: float = 1.0

    def rates(
        self, working: Collection[Engine], asleep: Collection[Engine] = (), others: int = 0
    ) -> dict[Engine, float]:
        """`asleep` are those of the working ones that wait inside a call: they keep their share of cores that
        are divided by need, and use none. `others`: threads that run beside the engines.
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
