"""How many seconds each action takes an engine that has its devices (or all cores) to itself. Computed by
arithmetic, as in `runtime/time_model.py`; `calibrate.py` replaces what a run has measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fopd_cli.engines.registry import engine_of, sampler_facts
from fopd_cli.plan.contention import usual_spread
from fopd_cli.plan.hardware import Hardware
from fopd_cli.plan.lengths import Lengths
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.memory.model import Models, Worker, total, workers
from fopd_cli.runtime.placement import TURNS, Plan
from fopd_cli.runtime.time_model import learner_flops

NO_GRAPHS = 10  # launching a layer's kernels one by one takes this many times as long as a graph; an estimate
JOIN = 2.5  # in passes: one pass, and copies of keys and values; estimated with small models on a CPU
THIN = 3  # on a CPU, decoding a token takes this many times as long as a token of a long text; an estimate
COPIES = 3  # times that keys and values cross memory in a pass if it joins new ones to them: twice, then read
EXCHANGE = 1.2e-3  # seconds to take requests, or to hand over finished ones and shrink; estimated on a CPU
BOOKKEEPING, MESSAGE, SAMPLE = 5e-3, 3e-4, 2e-4  # seconds; estimated on a CPU


@dataclass(frozen=True)
class Call:
    """Seconds per call and per token in it. Several ranks share the tokens."""

    call: float
    token: float

    def seconds(self, tokens: float) -> float:
        return self.call + self.token * tokens


@dataclass(frozen=True)
class Decoding:
    """A sampler replica. Seconds per pass (`step`), per running row in a pass, per prompt token, to load new
    weights, to let requests join running ones, and to exchange some with the conductor. At most `rows` run
    at once; at least `free` of them must be free before others join.
    """

    step: float
    row: float
    prompt_token: float
    load: float
    rows: int
    join: float = 0.0
    exchange: float = 0.0
    free: int = 1


@dataclass(frozen=True)
class Costs:
    """The costs of all roles, in seconds. `measured` names the roles that a run has measured; the rest is
    arithmetic.
    """

    decoding: Decoding
    scoring: tuple[Call, ...]  # per teacher, without its delay
    training: Call
    publish: float
    measuring: Call
    grade: float = 0.0  # per sample
    bookkeeping: float = BOOKKEEPING  # conductor, per optimizer step
    message: float = MESSAGE  # conductor, per answer received
    sample: float = SAMPLE  # conductor, per response
    tools: float = 0.0  # per episode
    turn: float = 0.0  # between two roles' turns, where they take turns
    save: float = 0.0  # per checkpoint
    spread: float = 1.0  # how much engines on a CPU slow each other down
    measured: frozenset[str] = frozenset()


def by_arithmetic(
    recipe: Recipe, plan: Plan, models: Models, hardware: Hardware, responses: Lengths, prompts: Lengths
) -> Costs:
    """Costs by arithmetic only."""
    s, rates, size = models.student, hardware.rates, hardware.size
    launch = hardware.launch
    found = workers(recipe, plan, models, hardware.nbytes)
    split = max(1, len(plan.samplers[0].devices))
    reading = split * rates.bandwidth * rates.reading
    here = next((w.use for w in found if w.spec == plan.samplers[0]), None)
    rows = recipe.sampler.concurrency
    if here is not None and here.rows:  # as many as the cache holds at half their full length
        rows = min(rows, max(1, int(2 * here.rows)))
    judged = split * rates.flops * rates.judging
    # A GPU computes while it reads; on a CPU, computing a row takes longer than reading its keys and values.
    computed = THIN * 2 * s.active / judged if hardware.cpu else 0.0
    graphs = hardware.cpu or engine_of(recipe.sampler).claims
    sent = models.trainable if recipe.student.lora and recipe.student.lora.publish == "adapter" else None
    moved = size * (s.parameters if sent is None else sent) / rates.host
    # each rank writes its own shards, unless weights are made whole for it
    merged = models.trainable is not None and sent is None
    gathered = merged or recipe.placement.transport in ("broadcast", "ipc")
    writers = 1 if gathered else len(plan.learners)
    a_pass = size * s.parameters / reading + s.layers * launch * (1 if graphs else NO_GRAPHS)
    joins = sampler_facts(recipe.sampler).joins
    # An engine whose rows are joined holds them all as wide as the longest.
    held = COPIES * responses.longest_of(rows) if joins else responses.context
    decoding = Decoding(
        step=a_pass,
        row=size * s.kv * ((COPIES if joins else 1) * prompts.mean + held) / reading + computed,
        prompt_token=2 * s.active / judged,
        load=moved,
        rows=rows,
        join=JOIN * a_pass if joins else 0.0,
        exchange=EXCHANGE if joins else 0.0,
        free=max(1, int(joins * recipe.sampler.concurrency)),
    )
    scoring = []
    for section in recipe.teachers:
        if engine_of(section).remote:  # nothing is known about a server
            scoring.append(Call(0.0, 0.0))
            continue
        t = models.teachers[section.name]
        split = engine_of(section).devices(section)
        scoring.append(Call(t.layers * launch, 2 * t.active / (split * rates.flops * rates.judging)))
    train = learner_flops(recipe, models, 1) / (rates.flops * rates.training)
    return Costs(
        decoding,
        tuple(scoring),
        Call(3 * s.layers * launch, train),
        publish=moved / writers,
        measuring=Call(s.layers * launch, train / 3),
        turn=_turn(plan, found, rates.host),
        spread=usual_spread(plan),
    )


def _turn(plan: Plan, found: Sequence[Worker], host: float) -> float:
    """Seconds to put one role to sleep and wake another: what changes crosses the bus both ways, what never
    does only on the way back. The mean over workers, and over all turns: where one overlaps, both ways at
    once.
    """
    if not plan.exclusive:
        return 0.0
    moved = [(total(w.use.saved), total(w.use.woken)) for w in found if w.spec.devices]
    apart, together = sum(map(sum, moved)), sum(map(max, moved))
    overlapping = len(plan.overlaps) / len(TURNS)
    return (overlapping * together + (1 - overlapping) * apart) / max(1, len(moved)) / host
