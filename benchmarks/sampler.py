"""Our vLLM engines against their rivals, side by side, on the same requests and weights.

    OMP_NUM_THREADS=2 python benchmarks/sampler.py [--rounds 5] [--models tiny,110m] [--device cpu]

generation   our sampler; bare `vllm.LLM.generate`, same sampling parameters; our transformers sampler
             (continuous, and plain `model.generate` without log-probs)
scoring      our vLLM teacher; our transformers teacher (top-64 at every response position)
publication  learner -> shared memory, shared memory -> running vLLM engine; a plain memcpy of the same bytes

Contenders alternate, so that a busy machine affects all alike; the first round warms up and is not counted.
Ratios are medians of those within a round. Each engine has a process of its own: of engines that can sleep,
as ours do on CUDA, vLLM allows one a process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.engines.vllm.sampler import VllmSampler
from fopd_cli.engines.vllm.teacher import VllmTeacher
from fopd_cli.recipe import Vllm
from fopd_cli.runtime.memory.arena import targets_at
from fopd_cli.runtime.memory.shared import shared_bytes
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.samples import Request, Rollout, SamplingParams, TargetSpec

ROOT = Path(__file__).resolve().parent.parent
DTYPE, K, CONTEXT = torch.bfloat16, 64, 256
# (requests, tokens each) of a round
LOAD = {"tiny": (64, 64), "110m": (32, 32)}
SHARE = 0.25  # of a device, for each of up to two vLLM engines on it

Work = Callable[[], float]  # does a round's work; returns how much it was (tokens, bytes)


def model_folder(name: str, folder: Path) -> Path:
    """The shipped tiny student, or a Llama of 110M parameters with random weights."""
    if name == "tiny":
        return ROOT / "recipes" / "tiny" / "student"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(DTYPE).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(ROOT / "recipes" / "tiny" / "student").save_pretrained(folder)
    return folder


def requests(count: int, tokens: int, vocab: int) -> list[Request]:
    rng = np.random.Generator(np.random.PCG64(0))
    params = SamplingParams(max_new_tokens=tokens)
    return [Request(i, rng.integers(4, vocab, size=16).astype(np.int32), i, params) for i in range(count)]


def drain(sampler: Any, wanted: list[Request]) -> list[Rollout]:
    sampler.submit(wanted)
    rollouts: list[Rollout] = []
    while sampler.busy:
        rollouts += sampler.step()
    return rollouts


class Engine:
    """A process of its own in which `make(*args)` has made some work, by name."""

    def __init__(self, make: Callable[..., Mapping[str, Work]], *args: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, args))
        self._process.start()
        theirs.close()

    def rate(self, name: str) -> float:
        """Do that work once: how much of it a second."""
        self._pipe.send(name)
        return float(self._pipe.recv())  # EOFError: it has failed, and said why

    def close(self) -> None:
        self._process.kill()  # vLLM does not shut down in order
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Mapping[str, Work]], args: tuple[Any, ...]) -> None:
    work = make(*args)
    while True:
        name = pipe.recv()
        began = time.perf_counter()
        amount = work[name]()
        pipe.send(amount / (time.perf_counter() - began))


class Bench:
    """Runs every contender once per round, in a rotating order; figures are per second."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.figures: dict[str, list[float]] = defaultdict(list)

    def run(self, contenders: Mapping[str, Engine]) -> None:
        names = list(contenders)
        self.figures |= {name: [] for name in names}  # the table's order
        try:
            for number in range(self.rounds + 1):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    rate = contenders[name].rate(name)
                    if number > 0:
                        self.figures[name].append(rate)
        finally:
            for engine in contenders.values():
                engine.close()

    def table(self, first: str, unit: str, scale: float) -> list[str]:
        lines = []
        for name, values in self.figures.items():
            ratios = [a / b for a, b in zip(self.figures[first], values, strict=True)]
            lines.append(
                f"| {name} | {_plain(statistics.median(values) / scale)} {unit} | "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f}) |"
            )
        return lines


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def options(folder: Path, device: str, **changes: Any) -> vllm_engine.VllmOptions:
    values: dict[str, Any] = {
        "key": "benchmark",
        "model": str(folder),
        "dtype": DTYPE,
        "cuda": device == "cuda",
        "max_tokens": CONTEXT,
        "max_requests": 64,
        "max_logprobs": K,
        "cache_bytes": 1 << 30,
        "live_weights": True,
        "seeded": True,
    }
    section = Vllm(
        gpu_memory=SHARE, **{key: changes.pop(key) for key in [*changes] if key in Vllm.model_fields}
    )
    return vllm_engine.VllmOptions(section, **{**values, **changes})


# ---- generation: every contender generates the same number of tokens, as nothing stops it -----------------

OURS, BARE = "our vLLM sampler", "vllm.LLM.generate"
PLAIN, GENERATE = "our transformers sampler", "transformers generate"


def load_of(name: str, folder: Path) -> list[Request]:
    return requests(*LOAD[name], min(250, hf.vocab_size(hf.load_config(str(folder), "m"))))


def on_vllm(folder: Path, device: str) -> VllmSampler:
    config = hf.load_config(str(folder), "m")
    sampler = VllmSampler(options(folder, device), hf.TokenRules(frozenset(), 0), hf.tied_names(config))
    sampler.stop = []
    return sampler


def ours(name: str, folder: Path, device: str) -> dict[str, Work]:
    sampler, wanted = on_vllm(folder, device), load_of(name, folder)
    return {OURS: lambda: sum(r.response_length for r in drain(sampler, wanted))}


def bare(name: str, folder: Path, device: str) -> dict[str, Work]:
    # as ours: the engine in this process, which does not claim cores
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_HOST_IP="127.0.0.1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    _, tokens = LOAD[name]
    wanted = load_of(name, folder)
    engine = vllm.LLM(**vllm_engine.engine_args(options(folder, device, live_weights=False)))
    params = [
        vllm.SamplingParams(max_tokens=tokens, seed=r.seed, logprobs=0, ignore_eos=True, detokenize=False)
        for r in wanted
    ]
    prompts: Any = [{"prompt_token_ids": r.token_ids.tolist()} for r in wanted]

    def generate() -> float:
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return {BARE: generate}


def transformers(name: str, folder: Path, device: str) -> dict[str, Work]:
    count, tokens = LOAD[name]
    wanted = load_of(name, folder)
    model: Any = hf.load_model(str(folder), "m", DTYPE).to(device)
    sampler = TransformersSampler(model, hf.TokenRules(frozenset(), 0), torch.device(device), count)
    ids = torch.from_numpy(np.stack([r.token_ids for r in wanted])).long().to(device)

    @torch.no_grad()
    def generate() -> float:
        out = model.generate(
            ids,
            do_sample=True,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            attention_mask=torch.ones_like(ids),
        )
        return float(out[:, ids.shape[1] :].numel())

    return {PLAIN: lambda: sum(r.response_length for r in drain(sampler, wanted)), GENERATE: generate}


def generation(name: str, folder: Path, device: str, rounds: int) -> list[str]:
    both = Engine(transformers, name, folder, device)
    engines = {OURS: Engine(ours, name, folder, device)}
    engines[OURS].rate(OURS)  # vLLM measures what is free: the next one starts when this one has
    engines |= {BARE: Engine(bare, name, folder, device), PLAIN: both, GENERATE: both}
    bench = Bench(rounds)
    bench.run(engines)
    return bench.table(OURS, "tok/s", 1)


# ---- scoring -----------------------------------------------------------------------------------------------

FAST, SLOW = "our vLLM teacher", "our transformers teacher"


def scores(teacher: Any, count: int, vocab: int) -> Work:
    rng = np.random.Generator(np.random.PCG64(1))
    rollouts = []
    for i in range(count):
        n = int(rng.integers(32, 200))
        ids = rng.integers(4, min(250, vocab), size=16 + n).astype(np.int32)
        rollouts.append(Rollout(i, ids, 16, np.ones(n, bool), np.zeros(n, np.float32), [(0, 0, n)], "stop"))
    spec = TargetSpec("topk", K, DTYPE)
    room = shared_bytes(spec.nbytes(200))
    targets = [targets_at(room, 0, spec, r.response_length) for r in rollouts]
    tokens = sum(len(r.token_ids) for r in rollouts)

    def score() -> float:
        teacher.score(rollouts, targets)
        return float(tokens)

    return score


def fast(name: str, folder: Path, device: str) -> dict[str, Work]:
    vocab = hf.vocab_size(hf.load_config(str(folder), "m"))
    changes = {"live_weights": False, "seeded": False, "max_batched_tokens": 2048}
    return {FAST: scores(VllmTeacher(options(folder, device, **changes)), LOAD[name][0], vocab)}


def slow(name: str, folder: Path, device: str) -> dict[str, Work]:
    vocab = hf.vocab_size(hf.load_config(str(folder), "m"))
    model = hf.load_model(str(folder), "m", DTYPE)
    teacher = TransformersTeacher(model, torch.device(device), 1, 16384, vocab, 4096)
    return {SLOW: scores(teacher, LOAD[name][0], vocab)}


def scoring(name: str, folder: Path, device: str, rounds: int) -> list[str]:
    bench = Bench(rounds)
    bench.run({FAST: Engine(fast, name, folder, device), SLOW: Engine(slow, name, folder, device)})
    return bench.table(FAST, "tok/s", 1)


# ---- publication -------------------------------------------------------------------------------------------

COPY, WRITE, READ = "memcpy", "learner -> shared memory (with the cast)", "shared memory -> vLLM"


def published(folder: Path, device: str) -> dict[str, Work]:
    sampler = on_vllm(folder, device)
    channel = WeightChannel.create(hf.weight_layout(hf.load_config(str(folder), "m"), DTYPE))
    # fp32 masters, as a learner has
    weights = hf.load_model(str(folder), "m", torch.float32).to(device).state_dict()
    given = [(n, weights[n]) for n, _, _ in channel.layout]
    source = torch.zeros(channel.slot_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    version = 0

    def memcpy() -> float:
        target.copy_(source)
        return channel.slot_bytes

    def write() -> float:
        nonlocal version
        version += 1
        return channel.write(version, iter(given))

    def load() -> float:
        sampler.load(version, channel.read(version))
        return channel.slot_bytes

    write()
    return {COPY: memcpy, WRITE: write, READ: load}


def publication(name: str, folder: Path, device: str, rounds: int) -> list[str]:
    bench = Bench(rounds)
    bench.run(dict.fromkeys((COPY, WRITE, READ), Engine(published, folder, device)))
    return bench.table(COPY, "GB/s", 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="tiny,110m", help="comma-separated, of: tiny, 110m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if (problem := vllm_engine.problem()) is not None:
        raise SystemExit(problem)
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(name, Path(scratch))
            for part in (generation, scoring, publication):
                lines = part(name, folder, args.device, args.rounds)
                title = f"{name}, {part.__name__}"
                print(f"\n| {title} | median | how many times the first line is faster |\n|---|---|---|")
                print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
