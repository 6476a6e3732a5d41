"""How much memory each process takes, by arithmetic: nothing is loaded, no device is queried.

A process holds some things at all times and others in phases of its work, one phase at a time; its peak is
the former plus the largest phase. `tests/runtime/test_memory_model.py` checks the sums against measured bytes
on a CPU: shards and their states, what a block keeps for its backward pass, resident memory of real
processes. What can only be measured on a GPU (a CUDA context, the buffers of its libraries) is an estimate
and marked as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fopd_cli.engines.models.shapes import Shapes
from fopd_cli.engines.registry import engine_of
from fopd_cli.recipe.schema import GPU_MEMORY, Learner, Recipe, Sampler, Teacher
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.sizes import total_memory
from fopd_cli.runtime.placement import FULL, SPARE, TURNS, Plan, Shares, Turn
from fopd_cli.runtime.weights.broadcast import AHEAD, BUCKET

MB, GB = 1 << 20, 10**9
CONTEXT = 1 * GB  # of CUDA and its libraries in each process; an estimate
RANKS = int(0.5 * GB)  # NCCL's buffers where there are several ranks; an estimate
CUBLAS = 32 * MB  # of cuBLAS, allocated by PyTorch, on Hopper; 8 MB before
GRAPHS = int(1.5 * GB)  # vLLM's CUDA graphs and workspaces; an estimate
ASLEEP = 2 * GB  # what vLLM keeps on a device while it sleeps; an estimate
PROCESS = 462 * MB  # of main memory: Python, torch, transformers
VLLM = 500 * MB  # on top of that, vLLM
CUDA_PROCESS = 3 * GB  # of main memory, with CUDA's libraries, too; an estimate
BATCHED_TOKENS = 8192  # vLLM's tokens per forward pass, by default
HEAD_CHUNK = 512 << 20  # of the teacher's log-probs, twice HEAD_CHUNK_BYTES


@dataclass(frozen=True)
class Part:
    """Something that takes memory."""

    what: str
    nbytes: int


Parts = tuple[Part, ...]


def total(parts: Parts) -> int:
    """The bytes of all parts."""
    return sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class Use:
    """What one process holds on one device (or in main memory, on a CPU), and in main memory beside it."""

    always: Parts
    phases: dict[str, Parts] = field(default_factory=dict)  # what comes on top, one phase at a time
    asleep: Parts = ()  # on the device, while other roles take their turn
    host: Parts = ()  # in main memory, where the rest is on a device
    host_asleep: Parts = ()  # what sleeping adds to that
    saved: Parts = ()  # what each sleep copies from a device; what never changes was copied once
    woken: Parts = ()  # what each waking copies back to it
    least: int = 0  # vLLM: bytes of the device that it needs to start, an update included
    row: int = 0  # vLLM: bytes of the keys and values of a sample of full length
    rows: float = 0.0  # vLLM: how many of these its cache holds

    @property
    def phase(self) -> str:
        """The phase that takes most; empty: there are none."""
        return max(self.phases, key=lambda name: total(self.phases[name]), default="")

    @property
    def cache(self) -> int:
        """vLLM: bytes of its keys and values."""
        return int(self.rows * self.row)

    @property
    def parts(self) -> Parts:
        """At its peak, the largest first."""
        found = (*self.always, *self.phases.get(self.phase, ()))
        return tuple(sorted((p for p in found if p.nbytes), key=lambda p: -p.nbytes))

    @property
    def peak(self) -> int:
        return total(self.parts)


def largest(parts: Parts, count: int = 4) -> str:
    """For people: the sum's largest parts in GB."""
    return ", ".join(f"{part.what} {part.nbytes / GB:.1f}" for part in parts[:count])


# ---- what a token leaves behind ----------------------------------------------------------------------------


def kept_by_a_block(s: Shapes, size: int) -> int:
    """Bytes per token that a block keeps for its backward pass, with numbers of `size` bytes: both norms'
    fp32 input, their result before and after their weight; queries, keys, values and attention's output; the
    MLP's gate, its activation, the other half and their product.
    """
    norm = 4 + 2 * size
    normed = (4 + size) * (s.queries + s.keys // 2) if s.normed_queries else 0
    return 2 * norm * s.width + normed + size * (2 * s.queries + s.keys) + 4 * size * s.inner


def under_way_in_a_block(s: Shapes, size: int) -> int:
    """Bytes per token at the widest point of a block's forward pass without gradients: the residual, a norm,
    the MLP's gate, other half and product.
    """
    return size * 2 * s.width + (4 + size) * s.width + size * max(3 * s.inner, 2 * s.queries + s.keys)


def attending(s: Shapes, size: int, read: int, held: int) -> int:
    """Bytes in a block while `read` tokens attend to the cache of `held`: its keys and values, joined to new
    ones, and copied for all query heads that share them, since rows are padded and so are masked.
    """
    copied = 2 * s.queries if 2 * s.queries > s.keys else 0
    return size * (read * (2 * s.width + 2 * s.queries + s.keys) + held * (s.keys + copied))


def backward_of_a_block(s: Shapes, size: int) -> int:
    """Bytes per token of gradients at the widest point: those of the MLP's inner values, and of a norm in
    fp32.
    """
    return 3 * size * s.inner + 8 * s.width


def chunk_bytes(recipe_mb: int | None, s: Shapes, cuda: bool) -> int:
    """Bytes of one `[positions, vocab]` buffer of the loss; see `losses/chunked.py`."""
    if recipe_mb is not None:
        return recipe_mb << 20
    return max((512 if cuda else 64) << 20, s.head)


# ---- the roles ---------------------------------------------------------------------------------------------


def learner(
    section: Learner,
    s: Shapes,
    heads: Sequence[Shapes],
    *,
    world: int,
    compute: torch.dtype,
    cuda: bool,
    tokens: int,
    longest: int,
    trainable: int | None = None,
    head_dtype: torch.dtype = torch.bfloat16,
    full: bool = True,
    chunk_mb: int | None = None,
    staged: bool = False,
    published: int = 0,
) -> Use:
    """One rank of `world`. `tokens` is the length of its share of a batch, `longest` that of one sample.

    `heads` are those of teachers that give hidden states. `trainable` counts adapter parameters; None: all
    weights learn. `full`: the loss has its own formula; others use autograd and keep twice as many buffers.
    `staged`: checkpoints are written from a copy. `published`: bytes of versions that it holds for samplers.
    """
    size, learns = compute.itemsize, s.parameters if trainable is None else trainable
    sharded = world > 1 or section.offload or compute != torch.float32
    moments = 2 * (4 if section.optimizer_dtype == "fp32" else 2)
    masters = Part("master weights in fp32", 4 * learns // world)
    states = Part("AdamW's states", moments * learns // world)
    frozen = Part("frozen base", 0 if trainable is None else s.parameters * size // world)
    state = (masters, Part("gradients in fp32", 4 * learns // world), states, frozen)
    their_heads = Part("teacher heads", sum(h.head * head_dtype.itemsize for h in heads))
    always = (
        *(() if section.offload and cuda else state),
        their_heads,
        Part("published weights, two versions", published),
        *_context(cuda, world),
    )
    batch = max(min(section.micro_tokens, tokens), longest)
    layers = s.layers * size * s.width if section.activation_checkpointing else 0
    block = kept_by_a_block(s, size) * (1 if section.activation_checkpointing else s.layers)
    gathered = size * (s.root + 2 * s.block) if sharded else 0
    chunk = min(chunk_bytes(chunk_mb, s, cuda), 4 * s.vocab * batch)
    head_learns = trainable is None
    inputs = sum({h.width * head_dtype.itemsize for h in heads}) * batch
    loss = (
        Part("gathered weights", gathered),
        Part("activations", batch * (layers + (0 if section.activation_checkpointing else block))),
        Part("logits, a chunk at a time", (3 if full else 6) * chunk),
        Part("head's gradient", (4 + size) * s.head if head_learns else 0),
        Part("hidden states, theirs and ours", inputs + 2 * size * s.width * batch),
    )
    narrow = size * s.head if head_learns else 0
    backward = (
        Part("gathered weights", gathered),
        Part("activations", batch * (layers + block + backward_of_a_block(s, size))),
        Part("head's gradient", narrow),
        Part("hidden states, theirs and ours", inputs + 2 * size * s.width * batch),
        Part(
            "gradients on their way to the shards", 2 * (size + 4) * s.block if sharded and head_learns else 0
        ),
    )
    # At the end of a pass the embedding's and the head's gradients are scattered, once in fp32.
    scatter = (
        Part("gathered weights", size * s.root if sharded else 0),
        Part("gradients on their way to the shards", (size + 4) * s.root if sharded and head_learns else 0),
    )
    step = (Part("AdamW's states, widened", 0 if moments == 8 or section.offload else 8 * learns // world),)
    phases = {"loss": loss, "backward": backward, "scatter": scatter, "step": step}
    copy = Part("a checkpoint being written", (4 + moments) * learns // world if staged else 0)
    if not cuda:
        return Use((*always, copy, Part("process", PROCESS)), phases)
    # Heads have a copy in main memory at all times, and gradients are gone before it sleeps.
    host = (Part("process", CUDA_PROCESS), copy, their_heads, *(state if section.offload else ()))
    changes = () if section.offload else (masters, states)
    resting = () if section.offload else (*changes, frozen)
    return Use(
        always,
        phases,
        _context(cuda, world),
        host,
        host_asleep=resting,
        saved=changes,
        woken=(*resting, their_heads),
    )


def teacher(
    section: Teacher, s: Shapes, *, world: int, dtype: torch.dtype, cuda: bool, longest: int, log_probs: bool
) -> Use:
    """One rank of `world` of a teacher on transformers; `log_probs`: it makes logits, a chunk at a time."""
    size = dtype.itemsize
    weights = Part("weights", size * s.parameters // world)
    batch = max(min(section.micro_tokens, section.batch_samples * longest), longest)
    always = (
        weights,
        Part("gathered weights", size * s.root if world > 1 else 0),  # the root stays gathered
        *_context(cuda, world),
    )
    forward = (
        Part("gathered blocks", 2 * size * s.block if world > 1 else 0),
        Part("activations", batch * (under_way_in_a_block(s, size) + size * s.width)),
        Part("logits, a chunk at a time", HEAD_CHUNK if log_probs else 0),
    )
    if not cuda:
        return Use((*always, Part("process", PROCESS)), {"forward": forward, "load": (_files(s, size),)})
    host = (Part("process", CUDA_PROCESS),)
    return Use(
        always, {"forward": forward}, _context(cuda, world), host, host_asleep=(weights,), woken=(weights,)
    )


def sampler(
    section: Sampler, s: Shapes, *, dtype: torch.dtype, cuda: bool, longest: int, arriving: int = 0
) -> Use:
    """A sampler on transformers: one replica on one device. `arriving`: bytes of new weights on their way
    into the model.
    """
    size, rows = dtype.itemsize, section.concurrency
    weights = Part("weights", size * s.parameters)
    held = rows * longest
    always = (weights, *_context(cuda, 1))
    # After an update in mid-rollout, all rows are read again, in pieces if the model allows it.
    read = min(held, max(section.prefill_tokens, rows)) if s.in_pieces else held
    forward = (
        Part("KV cache", size * s.kv * held),
        Part("activations", max(read * under_way_in_a_block(s, size), attending(s, size, read, held))),
        Part("logits", rows * s.vocab * (size + 3 * 4 + 2 * 8)),
    )
    # Running requests keep their cache meanwhile.
    update = (Part("KV cache", size * s.kv * held), Part("an update on its way", arriving))
    phases = {"forward": forward, "update": update}
    if not cuda:
        return Use((*always, Part("process", PROCESS)), {**phases, "load": (_files(s, size),)})
    host = (Part("process", CUDA_PROCESS),)
    return Use(always, phases, _context(cuda, 1), host, host_asleep=(weights,), woken=(weights,))


def vllm(
    s: Shapes,
    *,
    dtype: torch.dtype,
    split: int,
    share: float,
    device: int,
    longest: int,
    batched: int | None,
    cache_bytes: int | None,
    log_probs: bool,
    live: bool,
    arriving: int = 0,
) -> Use:
    """One replica split over `split` devices of `device` bytes. It takes the fraction `share` of each at its
    start, whatever it needs, or `cache_bytes` for keys and values if given. `live`: its weights are updated.
    `arriving`: as for `sampler`.
    """
    size = dtype.itemsize
    weights = Part("weights", size * s.parameters // split)
    tokens = batched or (2048 if log_probs else max(BATCHED_TOKENS, longest))
    logits = tokens * s.vocab * 8 if log_probs else 256 * s.vocab * 4 * 3
    working = (
        weights,
        Part("activations", tokens * under_way_in_a_block(s, size)),
        Part("logits", logits),
        Part("vLLM's graphs and workspaces (estimate)", GRAPHS),
        *_context(True, split),
    )
    # An update comes a layer at a time, outside what vLLM counts.
    update = Part("an update on its way", 2 * size * s.block + arriving if live else 0)
    token = max(1, size * s.kv // split)
    left = max(0, int(share * device) - total(working))
    cache = left if cache_bytes is None else cache_bytes // split
    # It copies frozen weights anew at each sleep, and drops live ones, which are loaded when it wakes.
    kept = () if live else (weights,)
    return Use(
        (*working, Part("KV cache", cache)),
        {"update": (update,)},
        (Part("vLLM, asleep (estimate)", ASLEEP),),
        (Part("process", split * CUDA_PROCESS),),
        host_asleep=() if live else (Part("weights", size * s.parameters),),  # those of all devices
        saved=kept,
        woken=kept,
        least=total(working) + token * longest + update.nbytes,
        row=token * longest,
        rows=cache / (token * longest),
    )


def vllm_on_cpu(s: Shapes, *, dtype: torch.dtype, rows: int, longest: int, batched: int | None) -> Use:
    """One process of vLLM's CPU build. Its cache holds what all requests can need, at most an eighth of the
    memory; see `with_cpu_cache` in `engines/vllm/build.py`.
    """
    size = dtype.itemsize
    tokens = max(batched or 4096, longest)
    return Use(
        (
            Part("weights", size * s.parameters),
            Part("KV cache", min(size * s.kv * rows * (longest + 256), total_memory() // 8)),
            Part("activations", tokens * under_way_in_a_block(s, size)),
            Part("process", PROCESS + VLLM),
        )
    )


def _files(s: Shapes, size: int) -> Part:
    """Pages of the checkpoint that stay mapped while it is widened; most have two bytes per number."""
    return Part("files that are being read", 2 * s.parameters if size > 2 else 0)


def _context(cuda: bool, world: int) -> Parts:
    if not cuda:
        return ()
    return (
        Part("CUDA and its libraries (estimate)", CONTEXT + (RANKS if world > 1 else 0)),
        Part("cuBLAS's workspace", CUBLAS),
    )


# ---- a run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """What is known of a run's models without loading them, and how long its samples can get."""

    student: Shapes
    teachers: Mapping[str, Shapes]  # those that run here, by name
    longest: int  # tokens of the longest sample, as the student has it
    judged: int  # and as teachers judge it
    trainable: int | None = None  # parameters of adapters; None: all weights learn


@dataclass(frozen=True)
class Worker:
    """One process of a plan and what it takes."""

    spec: WorkerSpec
    use: Use


def workers(recipe: Recipe, plan: Plan, models: Models, device_bytes: int) -> list[Worker]:
    """Every process that holds a model, on devices of `device_bytes` each."""
    found = [Worker(spec, of_learner(recipe, spec, models)) for spec in plan.learners]
    for section, ranks in zip(recipe.teachers, plan.teachers, strict=True):
        if not engine_of(section).remote:
            found += [Worker(r, of_teacher(recipe, section, r, models, device_bytes)) for r in ranks]
    found += [Worker(spec, of_sampler(recipe, spec, models, device_bytes)) for spec in plan.samplers]
    return found


def of_learner(recipe: Recipe, spec: WorkerSpec, models: Models) -> Use:
    """One rank of a plan's learner."""
    section, cuda = recipe.learner, bool(spec.devices)
    hidden = recipe.targets == "hidden"
    return learner(
        section,
        models.student,
        [models.teachers[t.name] for t in recipe.teachers if t.name in models.teachers] if hidden else [],
        world=spec.world,
        compute=_dtype(section.dtype, cuda),
        cuda=cuda,
        tokens=-(-section.batch_samples // spec.world) * models.longest,
        longest=models.longest,
        trainable=models.trainable,
        head_dtype=_dtype(recipe.teachers[0].dtype, cuda),
        full=recipe.support == "full",
        chunk_mb=recipe.loss.chunk_mb,
        staged=recipe.checkpoint.staged,
        published=2 * _version(recipe, models, cuda) if _keeps_versions(recipe, spec) else 0,
    )


def _version(recipe: Recipe, models: Models, cuda: bool) -> int:
    """Bytes of one version of what samplers get."""
    lora = recipe.student.lora
    adapter = lora is not None and lora.publish == "adapter" and models.trainable is not None
    count = models.trainable if adapter and models.trainable is not None else models.student.parameters
    return count * _dtype(recipe.sampler.dtype, cuda).itemsize


def _keeps_versions(recipe: Recipe, spec: WorkerSpec) -> bool:
    """Whether a learner's rank holds them in its own memory; see `runtime/weights`."""
    transport = recipe.placement.transport
    return transport == "ipc" or (transport == "broadcast" and spec.rank == 0)


def _arriving(recipe: Recipe, models: Models, cuda: bool) -> int:
    """Bytes of a broadcast that a sampler holds beside its model."""
    if recipe.placement.transport != "broadcast":
        return 0
    largest = models.student.head * _dtype(recipe.sampler.dtype, cuda).itemsize
    return min((AHEAD + 1) * max(BUCKET, largest), _version(recipe, models, cuda))


def of_teacher(recipe: Recipe, section: Teacher, spec: WorkerSpec, models: Models, device_bytes: int) -> Use:
    """One rank of a teacher that runs here."""
    s, rows = models.teachers[section.name], section.batch_samples
    if engine_of(section).claims:
        return _claiming(section, spec, s, device_bytes, rows=rows, longest=models.judged)
    cuda = bool(spec.devices)
    return teacher(
        section,
        s,
        world=1 if spec.whole else spec.world,
        dtype=_dtype(section.dtype, cuda),
        cuda=cuda,
        longest=models.judged,
        log_probs=recipe.targets != "hidden",
    )


def of_sampler(recipe: Recipe, spec: WorkerSpec, models: Models, device_bytes: int) -> Use:
    """One replica of a plan's sampler."""
    section, s, rows = recipe.sampler, models.student, recipe.sampler.concurrency
    if engine_of(section).claims:
        arriving = _arriving(recipe, models, bool(spec.devices))
        return _claiming(section, spec, s, device_bytes, rows=rows, longest=models.longest, arriving=arriving)
    cuda = bool(spec.devices)
    return sampler(
        section,
        s,
        dtype=_dtype(section.dtype, cuda),
        cuda=cuda,
        longest=models.longest,
        arriving=_arriving(recipe, models, cuda),
    )


def _claiming(
    section: Sampler | Teacher,
    spec: WorkerSpec,
    s: Shapes,
    device_bytes: int,
    *,
    rows: int,
    longest: int,
    arriving: int = 0,
) -> Use:
    """An engine that claims a share of each device at its start. Only a sampler's weights are updated."""
    keys, cuda, samples = engine_of(section).keys(section), bool(spec.devices), isinstance(section, Sampler)
    dtype, batched = _dtype(section.dtype, cuda), keys.max_batched_tokens
    if not cuda:
        return vllm_on_cpu(s, dtype=dtype, rows=rows, longest=longest, batched=batched)
    return vllm(
        s,
        dtype=dtype,
        split=len(spec.devices),
        share=spec.share or keys.gpu_memory or GPU_MEMORY,
        device=device_bytes,
        longest=longest,
        batched=batched,
        cache_bytes=None if keys.kv_cache_gb is None else int(keys.kv_cache_gb * 1e9),
        log_probs=not samples,
        live=samples,
        arriving=arriving,
    )


@dataclass(frozen=True)
class Demand:
    """What a device must hold at the worst moment, and for which workers."""

    device: int
    who: str
    parts: Parts

    @property
    def nbytes(self) -> int:
        return total(self.parts)


def by_device(found: Sequence[Worker]) -> dict[int, list[Worker]]:
    """The workers on each device that any of them uses."""
    numbers = sorted({device for worker in found for device in worker.spec.devices})
    return {number: [w for w in found if number in w.spec.devices] for number in numbers}


def demands(plan: Plan, found: Sequence[Worker]) -> list[Demand]:
    """The worst moment of each device that the plan uses. Where roles take turns, sleeping ones still hold
    something, and two are awake where a turn overlaps; where roles share, all are at their peak at once.
    """
    worst = []
    for device, here in by_device(found).items():
        if plan.mode == "timeslice":
            moments = [
                (w.spec.name, (*w.use.parts, *(_asleep(o) for o in here if o.spec.role != w.spec.role)))
                for w in here
            ]
            moments += [
                (f"a turn from {sleeper} to {waker}", between(here, (sleeper, waker)))
                for sleeper, waker in plan.overlaps
            ]
        else:
            names = " + ".join(w.spec.name for w in here)
            moments = [(names, tuple(_named(w, p, len(here) > 1) for w in here for p in w.use.parts))]
        who, parts = max(moments, key=lambda m: total(m[1]))
        worst.append(Demand(device, who, tuple(sorted(parts, key=lambda p: -p.nbytes))))
    return worst


def between(here: Sequence[Worker], turn: Turn) -> Parts:
    """What the workers on one device hold while this turn overlaps.

    Whoever falls asleep counts with its peak: its allocator gives back what it keeps for the next one only at
    the end. Whoever wakes gets its weights and states, and computes nothing yet.
    """
    sleeper, waker = turn
    parts: list[Part] = []
    for worker in here:
        if worker.spec.role == sleeper:
            parts += [_named(worker, part, True) for part in worker.use.parts]
        elif worker.spec.role == waker:
            parts += [_named(worker, part, True) for part in worker.use.always]
        else:
            parts.append(_asleep(worker))
    return tuple(parts)


def may_overlap(here: Sequence[Worker], turn: Turn, device_bytes: int) -> bool:
    """Whether a device can hold both roles of a turn, with a tenth to spare.

    vLLM moreover fails if less of its device is free after it fell asleep than before. So who wakes may take
    no more than vLLM gives back for certain: its cache.
    """
    sleeper, waker = turn
    taken = sum(total(w.use.always) - total(w.use.asleep) for w in here if w.spec.role == waker)
    given_back = [w.use.cache for w in here if w.spec.role == sleeper and w.use.least]
    room = (1 - SPARE) * device_bytes
    return total(between(here, turn)) <= room and all(taken <= nbytes for nbytes in given_back)


def fits(worst: Sequence[Demand], device_bytes: int) -> bool:
    """Whether every device keeps a tenth of its memory free, to within one percent."""
    return all(demand.nbytes <= FULL * device_bytes for demand in worst)


def host(plan: Plan, found: Sequence[Worker], shared: int) -> Parts:
    """Main memory of all processes together. `shared`: the teacher targets' arena and the weights' slots."""
    parts = [Part("teacher targets and weights in shared memory", shared)]
    for worker in found:
        own = worker.use.host if worker.spec.devices else worker.use.parts
        if plan.mode == "timeslice":
            own = (*own, *worker.use.host_asleep)
        parts.append(Part(worker.spec.name, total(own)))
    return tuple(sorted(parts, key=lambda p: -p.nbytes))


def _asleep(worker: Worker) -> Part:
    return Part(f"{worker.spec.name}, asleep", total(worker.use.asleep))


def _named(worker: Worker, part: Part, several: bool) -> Part:
    return Part(f"{worker.spec.name}: {part.what}", part.nbytes) if several else part


def _dtype(name: str, cuda: bool) -> torch.dtype:
    wide = name == "fp32" or (name == "auto" and not cuda)
    return torch.float32 if wide else torch.bfloat16


def _sized(keys: Any) -> bool:
    """Whether the recipe says how much memory an engine that claims a share is to take."""
    return keys.gpu_memory is not None or keys.kv_cache_gb is not None


class Fit:
    """What placement asks: which roles a device can hold at once. Implements `placement.Memory`."""

    def __init__(self, recipe: Recipe, models: Models, device_bytes: int) -> None:
        self.recipe, self.models, self.device_bytes = recipe, models, device_bytes

    def whole(self, section: Teacher, spec: WorkerSpec) -> bool:
        """Whether one device can hold a whole teacher, with nothing else awake on it."""
        use = of_teacher(self.recipe, section, replace(spec, whole=True), self.models, self.device_bytes)
        return use.peak <= (1 - SPARE) * self.device_bytes

    def filled(self, plan: Plan) -> float:
        """What the fullest device of a plan must hold at the worst moment, as a fraction of its memory."""
        found = workers(self.recipe, plan, self.models, self.device_bytes)
        return max(demand.nbytes for demand in demands(plan, found)) / self.device_bytes

    def overlaps(self, plan: Plan) -> tuple[Turn, ...]:
        """The turns of a plan in which its devices can hold who falls asleep and who wakes at once."""
        groups = by_device(workers(self.recipe, plan, self.models, self.device_bytes)).values()
        return tuple(t for t in TURNS if all(may_overlap(here, t, self.device_bytes) for here in groups))

    def shares(self, plan: Plan) -> Shares | None:
        """The fractions of a device that vLLM engines may take where roles do not take turns; None: they do
        not fit.

        A share that the recipe names is taken as it is. By default a sampler's cache holds all its concurrent
        samples at full length, or what is left if that is less; an eighth of them must fit, as few ever
        reach that length.
        """
        room = (1 - SPARE) * self.device_bytes
        found = workers(self.recipe, plan, self.models, self.device_bytes)
        claims = engine_of(self.recipe.sampler).claims
        by_teacher: dict[str, float] = {}
        taken = 0
        for worker in {(w.spec.role, w.spec.index): w for w in found}.values():
            if worker.spec.role == "sampler" and claims:
                continue
            section = self.recipe.teachers[worker.spec.index] if worker.spec.role == "teacher" else None
            if section is not None and engine_of(section).claims:
                keys = engine_of(section).keys(section)
                claim = worker.use.peak if _sized(keys) else worker.use.least
                by_teacher[section.name] = claim / self.device_bytes
                taken += claim
            else:
                taken += worker.use.peak
        left = int(room - taken)
        if not claims:
            return Shares(None, by_teacher) if left >= 0 else None
        share = self._sampler_share(plan, left)
        return None if share is None else Shares(share, by_teacher)

    def _sampler_share(self, plan: Plan, left: int) -> float | None:
        """The fraction of a device for a sampler where `left` bytes are left; None: too little."""
        section, device = self.recipe.sampler, self.device_bytes
        keys = engine_of(section).keys(section)

        def use(share: float) -> Use:
            spec = replace(plan.samplers[0], share=share)
            return of_sampler(self.recipe, spec, self.models, device)

        first = use(keys.gpu_memory or 1.0)
        update = first.peak - total(first.always)  # outside what vLLM counts
        if keys.kv_cache_gb is not None:
            share = total(first.always) / device
        elif keys.gpu_memory is not None:
            share = keys.gpu_memory
        else:
            enough = first.least - update + (section.concurrency - 1) * first.row
            share = (min(left, enough + update) - update) / device
        found = use(share) if share > 0 else first
        fits = share > 0 and found.peak <= left and found.least <= found.peak
        return share if fits and found.rows >= max(1, section.concurrency / 8) else None
