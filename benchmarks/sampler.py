"""Our vLLM engines against their rivals, side by side in one process, on the same requests and weights.

    OMP_NUM_THREADS=2 python benchmarks/sampler.py [--rounds 5] [--models tiny,110m]

generation   our sampler; bare `vllm.LLM.generate`, same sampling parameters; our transformers sampler
             (continuous, and plain `model.generate` without log-probs)
scoring      our vLLM teacher; our transformers teacher (top-64 at every response position)
publication  learner -> shared memory, shared memory -> running vLLM engine; a plain memcpy of the same bytes

Contenders alternate, so that a busy machine affects all alike; the first round warms up and is not counted.
Medians of the ratios within a round come last.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
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
CPU, DTYPE, K, CONTEXT = torch.device("cpu"), torch.bfloat16, 64, 256
# (requests, tokens each) of a round
LOAD = {"tiny": (64, 64), "110m": (32, 32)}


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


class Bench:
    """Runs every contender once per round, in a rotating order; figures are per second."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.figures: dict[str, list[float]] = defaultdict(list)

    def run(self, contenders: dict[str, Callable[[], float]]) -> None:
        """Each contender returns how much it did (tokens, bytes)."""
        names = list(contenders)
        self.figures |= {name: [] for name in names}  # the table's order
        for number in range(self.rounds + 1):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                began = time.perf_counter()
                amount = contenders[name]()
                if number > 0:
                    self.figures[name].append(amount / (time.perf_counter() - began))

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


def options(folder: Path, **changes: Any) -> vllm_engine.VllmOptions:
    values: dict[str, Any] = {
        "key": "benchmark",
        "model": str(folder),
        "dtype": DTYPE,
        "cuda": False,
        "max_tokens": CONTEXT,
        "max_requests": 64,
        "max_logprobs": K,
        "cache_bytes": 1 << 30,
        "live_weights": True,
        "seeded": True,
    }
    section = Vllm(**{key: changes.pop(key) for key in [*changes] if key in Vllm.model_fields})
    return vllm_engine.VllmOptions(section, **{**values, **changes})


def generation(name: str, folder: Path, sampler: VllmSampler, rounds: int) -> list[str]:
    import vllm

    count, tokens = LOAD[name]
    config = hf.load_config(str(folder), "m")
    wanted = requests(count, tokens, min(250, hf.vocab_size(config)))
    nothing_stops = hf.TokenRules(frozenset(), 0)  # every contender generates the same number of tokens
    sampler.stop = []
    bare = vllm.LLM(**vllm_engine.engine_args(options(folder, live_weights=False)))
    model: Any = hf.load_model(str(folder), "m", DTYPE)
    plain = TransformersSampler(model, nothing_stops, CPU, count)
    params = [
        vllm.SamplingParams(max_tokens=tokens, seed=r.seed, logprobs=0, ignore_eos=True, detokenize=False)
        for r in wanted
    ]
    prompts: Any = [{"prompt_token_ids": r.token_ids.tolist()} for r in wanted]
    ids = torch.from_numpy(np.stack([r.token_ids for r in wanted])).long()

    def ours() -> float:
        return sum(r.response_length for r in drain(sampler, wanted))

    def theirs() -> float:
        return sum(len(o.outputs[0].token_ids) for o in bare.generate(prompts, params, use_tqdm=False))

    def transformers() -> float:
        return sum(r.response_length for r in drain(plain, wanted))

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

    bench = Bench(rounds)
    bench.run(
        {
            "our vLLM sampler": ours,
            "vllm.LLM.generate": theirs,
            "our transformers sampler": transformers,
            "transformers generate": generate,
        }
    )
    return bench.table("our vLLM sampler", "tok/s", 1)


def scoring(name: str, folder: Path, rounds: int) -> list[str]:
    count, _ = LOAD[name]
    vocab = hf.vocab_size(hf.load_config(str(folder), "m"))
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
    fast = VllmTeacher(options(folder, live_weights=False, seeded=False, max_batched_tokens=2048))
    plain = TransformersTeacher(hf.load_model(str(folder), "m", DTYPE), CPU, 1, 16384, vocab, 4096)

    def score(teacher: Any) -> float:
        teacher.score(rollouts, targets)
        return float(tokens)

    bench = Bench(rounds)
    bench.run({"our vLLM teacher": lambda: score(fast), "our transformers teacher": lambda: score(plain)})
    return bench.table("our vLLM teacher", "tok/s", 1)


def publication(folder: Path, sampler: VllmSampler, rounds: int) -> list[str]:
    config = hf.load_config(str(folder), "m")
    channel = WeightChannel.create(hf.weight_layout(config, DTYPE))
    weights = hf.load_model(str(folder), "m", torch.float32).state_dict()  # fp32 masters, as a learner has
    published = [(n, weights[n]) for n, _, _ in channel.layout]
    source = torch.zeros(channel.slot_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    version = 0

    def memcpy() -> float:
        target.copy_(source)
        return channel.slot_bytes

    def write() -> float:
        nonlocal version
        version += 1
        return channel.write(version, iter(published))

    def load() -> float:
        sampler.load(version, channel.read(version))
        return channel.slot_bytes

    write()
    bench = Bench(rounds)
    bench.run(
        {"memcpy": memcpy, "learner -> shared memory (with the cast)": write, "shared memory -> vLLM": load}
    )
    return bench.table("memcpy", "GB/s", 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="tiny,110m", help="comma-separated, of: tiny, 110m")
    args = parser.parse_args()
    if (problem := vllm_engine.problem()) is not None:
        raise SystemExit(problem)
    tables: list[str] = []
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = model_folder(name, Path(scratch))
            config = hf.load_config(str(folder), "m")
            sampler = VllmSampler(options(folder), hf.TokenRules(frozenset(), 0), hf.tied_names(config))
            for title, lines in (
                ("generation", generation(name, folder, sampler, args.rounds)),
                ("scoring", scoring(name, folder, args.rounds)),
                ("publication", publication(folder, sampler, args.rounds)),
            ):
                tables += [
                    f"\n{name}, {title}: median, and how many times the first line is faster",
                    "",
                    *lines,
                ]
    print("\n".join(tables), flush=True)
    os._exit(0)  # several vLLM engines in one process do not shut down in order


if __name__ == "__main__":
    main()
