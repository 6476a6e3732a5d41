"""Real vLLM engines in a child process that lives as long as the tests that use it.

vLLM changes its process for good (threads, process groups, environment), so it must not share one with other
tests; and starting it takes ten seconds and more, so the engines are kept and shared.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from fopd_cli.engines.models import hf
from fopd_cli.engines.vllm import engine as vllm_engine
from fopd_cli.recipe import Vllm
from fopd_cli.samples import Rollout

MAX_TOKENS = 320


class Host:
    """Runs functions in the child, one after the other."""

    late = 0  # calls of `step` until a token is seen that was sampled in one

    def __init__(self, log: Path) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log)))
        saved = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")}
        os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
        self._process.start()
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` over there; an exception there is an AssertionError here, with its traceback."""
        self._pipe.send((function, args))
        assert self._pipe.poll(300), "the engine does not answer"
        good, result = self._pipe.recv()
        assert good, result
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    _keep_engines()
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _keep_engines() -> None:
    """An engine that is garbage takes its process's groups with it, which all others in it use."""
    kept, plain = [], vllm_engine.VllmEngine.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kept.append(self)
        plain(self, *args, **kwargs)

    vllm_engine.VllmEngine.__init__ = init


def schedule_ahead() -> None:
    """Have the engines made in this process from now on schedule as on CUDA, where vLLM schedules a batch
    before it has seen what the one before has sampled (its CPU build never does by itself).
    """
    from vllm.config import VllmConfig

    VllmConfig.max_concurrent_batches = property(lambda _: 2)
    plain = vllm_engine.engine_args
    scheduler = {"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"}
    vllm_engine.engine_args = lambda options: plain(options) | scheduler


def in_flight(engine: Any) -> list[int]:
    """Tokens of each batch that a sampler's engine has scheduled and not yet seen the outcome of."""
    queue = engine.engine._core.batch_queue or ()
    return [scheduled.total_num_scheduled_tokens for _, scheduled, _ in queue]


def options(model: str, dtype: torch.dtype = torch.float32, **changes: Any) -> vllm_engine.VllmOptions:
    """`changes` are fields, or keys of the recipe's section."""
    values: dict[str, Any] = {
        "key": "sampler.vllm",
        "cuda": False,
        "max_tokens": MAX_TOKENS,
        "max_requests": 64,
        "max_logprobs": -1,
        "cache_bytes": 64 << 20,
        "live_weights": True,
        "prefix_caching": True,
        "seeded": True,
    }
    section = Vllm(**{key: changes.pop(key) for key in [*changes] if key in Vllm.model_fields})
    return vllm_engine.VllmOptions(section, model=model, dtype=dtype, **{**values, **changes})


@functools.cache
def sampler(model: str, stale_kv: bool = False) -> Any:
    """The one engine of this model in this process; whatever a test loaded into it stays there."""
    from fopd_cli.engines.vllm.sampler import VllmSampler

    config, tokenizer = hf.load_config(model, "m"), hf.load_tokenizer(model, "m")
    rules = hf.token_rules(model, tokenizer, config, "m")
    return VllmSampler(options(model, stale_kv=stale_kv), rules, hf.tied_names(config))


@functools.cache
def adapter_sampler(model: str, rank: int) -> Any:
    """The same for adapters over the model's weights."""
    from fopd_cli.engines.vllm.sampler import VllmSampler

    config, tokenizer = hf.load_config(model, "m"), hf.load_tokenizer(model, "m")
    rules = hf.token_rules(model, tokenizer, config, "m")
    adapter = vllm_engine.AdapterOptions(rank, 2.0 * rank)
    return VllmSampler(options(model, live_weights=False, adapter=adapter), rules, {})


def original(engine: Any, model: str, version: int = 0) -> Any:
    """Load the weights of the model's directory, so that tests do not depend on each other."""
    weights = hf.load_model(model, "m", torch.float32).state_dict()
    engine.load(version, published(weights, model))
    return engine


def published(weights: dict[str, torch.Tensor], model: str) -> list[tuple[str, torch.Tensor]]:
    """What the learner publishes: every distinct weight once, under its first name."""
    names = [name for name, _, _ in hf.weight_layout(hf.load_config(model, "m"), torch.float32)]
    return [(name, weights[name]) for name in names]


def drain(engine: Any) -> dict[int, Rollout]:
    out = {}
    while engine.busy:
        for rollout in engine.step():
            out[rollout.key] = rollout
    return out
