"""vLLM inside one of our worker processes: how it starts, and the few calls that the sampler and the teacher
make.

The engine core runs in the worker's own process, driven by `step`, one forward pass per call. There is no
second process to orphan and no serialization between us and vLLM's scheduler, and weights can be replaced
between any two steps. Only tensor parallelism starts processes, which `plugin` ties to this one.

This talks to vLLM below its `LLM` class (`EngineCore`, numpy log-probs, no text), so it is pinned to one
version. `fopd doctor` says which one, and the tests run against the real thing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.errors import UserError
from fopd_cli.recipe import Vllm
from fopd_cli.recipe.schema import GPU_MEMORY

TESTED_VERSION = "0.32.0"
TELLING = ("Value error", "Assertion failed", "must")  # mark the line of an error that says what is wrong


@dataclass(frozen=True)
class AdapterOptions:
    """The LoRA adapters that `load_adapter` will load."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class VllmOptions:
    """A recipe's `vllm` section and the run's own settings. `key` names the section in errors."""

    section: Vllm
    key: str
    model: str
    dtype: torch.dtype
    cuda: bool
    max_tokens: int  # prompt and response together
    max_requests: int  # running at once
    max_logprobs: int  # largest k requested; -1: the whole vocabulary
    cache_bytes: int | None = None  # default KV cache of a replica; None: vLLM's own choice
    batched_tokens: int | None = None  # default tokens per forward pass; None: vLLM's own choice
    prefix_caching: bool = False
    live_weights: bool = False  # whether `load` will be called
    stale_kv: bool = False  # whether running requests keep their keys and values at an update
    seeded: bool = False  # whether each request has its own seed
    adapter: AdapterOptions | None = None
    hidden: bool = False  # whether `take_hidden` will be called
    vocab: int | None = None  # ids from here on have zero probability; None: the pair shares all ids

    @property
    def kv_cache_bytes(self) -> int | None:
        """What vLLM is told: one device's (or process's) part of a replica's cache."""
        gigabytes, split = self.section.kv_cache_gb, self.section.tensor_parallel
        whole = self.cache_bytes if gigabytes is None else int(gigabytes * 1e9)
        return None if whole is None else whole // split

    @property
    def max_batched_tokens(self) -> int | None:
        return self.section.max_batched_tokens or self.batched_tokens


def installed_version() -> str | None:
    """The version of vLLM, from the CUDA or the CPU package; None if neither is installed."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def problem() -> str | None:
    """Why engine vllm cannot run here, and what to do about it; None if it can."""
    version = installed_version()
    if version is None or importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'fopd[vllm]' (CUDA) or scripts/install-vllm-cpu"
    if version.split("+")[0] != TESTED_VERSION:
        return (
            f"vLLM {version} is installed and fopd is tested with {TESTED_VERSION}: pip install "
            f"'vllm=={TESTED_VERSION}'"
        )
    return None


class VllmEngine:
    """One engine core. Raises `UserError` for what vLLM refuses, such as a context over its KV cache."""

    def __init__(self, options: VllmOptions) -> None:
        if (missing := problem()) is not None:
            raise UserError(f"{options.key}: {missing}")
        self.options = options
        _environment(options)
        # These imports take seconds, and read the variables set above.
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from fopd_cli.engines.vllm import plugin as vllm_plugin

        vllm_plugin.register()
        with logged_causes() as causes:
            try:
                engine: Any = LLMEngine.from_engine_args(EngineArgs(**engine_args(options)))
            except ValueError as error:  # includes pydantic's ValidationError
                why = f" ({causes[-1]})" if causes else ""
                raise UserError(f"{options.key}: vLLM refuses: {_message(error)}{why}") from None
        self._client: Any = engine.engine_core
        self._core: Any = self._client.engine_core
        self._engine = engine  # keeps the core alive
        self._running: set[str] = set()
        self._names = itertools.count()
        self._updates = 0
        self._adapter: Any = None  # the `LoRARequest` that new requests use
        if options.hidden:
            self._rpc("keep_hidden_states")
        elif options.vocab is not None:
            self._rpc("share_vocabulary", options.vocab)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._running)

    def add(self, token_ids: np.ndarray, **sampling: Any) -> str:
        """Queue a request of token ids; `sampling` holds vLLM's SamplingParams. Returns the request id that
        its outputs will carry.

        Ids are never reused. On CUDA vLLM schedules one step ahead of what it has seen, so a finished request
        may still be in the batch in flight. A new request with the same id would get that batch's token.
        """
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        name = str(next(self._names))
        self._running.add(name)
        self._client.add_request(
            EngineCoreRequest(
                request_id=name,
                prompt_token_ids=token_ids.tolist(),
                mm_features=None,
                sampling_params=SamplingParams(detokenize=False, **sampling),
                pooling_params=None,
                arrival_time=0.0,
                lora_request=self._adapter,
                cache_salt=str(self._updates)
                if self.options.stale_kv
                else None,  # of a prefix that can be shared
                data_parallel_rank=None,
            )
        )
        return name

    def step(self) -> list[Any]:
        """One forward pass; vLLM's `EngineCoreOutput`s, with `new_token_ids` and `new_logprobs` (numpy).

        Where vLLM schedules ahead, these are the outputs of the previous pass. When the last request ends,
        batches still in flight are finished and dropped.
        """
        outputs = self._advance()
        if not self._running:
            self._drop_batches()
        return outputs

    def _advance(self) -> list[Any]:
        outputs = self._client.get_output().outputs
        for output in outputs:
            if output.finished:
                self._running.discard(output.request_id)
                if str(output.finish_reason) not in ("stop", "length"):
                    raise RuntimeError(f"vLLM ended request {output.request_id} with {output.finish_reason}")
        return outputs

    def take_hidden(self, name: str) -> Tensor:
        """Post-norm hidden states `(prompt, hidden)` of a finished request, on the host."""
        found: Tensor = self._client.collective_rpc("take_hidden_states", args=(name,))[0]
        return found

    def abort(self) -> None:
        """Abort every request."""
        if self._running:
            self._client.abort_requests(list(self._running))
            self._running.clear()
        self._drop_batches()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> list[Any]:
        """Replace all weights; returns the outputs of steps still in flight, sampled with the old weights.

        Running requests continue afterwards. All cached keys and values (of running requests and of prefixes)
        are dropped. Keeping them would sample from a policy that is neither the old one nor the new one
        (measured: up to 12 nats off). With `stale_kv`, running requests do keep theirs; later requests never
        share them.
        """
        with self._between_steps() as late:
            self._rpc("start_weight_update")
            self._rpc("update_weights", {"weights": weights})
            self._rpc("finish_weight_update")
        return late

    def load_adapter(self, folder: str) -> list[Any]:
        """Like `load`, but replaces only the adapter: a directory in peft's format, no longer needed after
        the call.
        """
        from vllm.lora.request import LoRARequest

        with self._between_steps() as late:
            # The id never changes, so running requests continue with the new adapter.
            if not self._client.add_lora(LoRARequest("student", 1, folder, load_inplace=True)):
                raise RuntimeError("vLLM did not load the adapter")
            self._adapter = LoRARequest("student", 1, folder)
        return late

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[list[Any]]:
        """Nothing runs inside this block. Keys and values computed before it are dropped, or at least never
        shared afterwards.
        """
        self._core.pause_scheduler("keep", clear_cache=False)
        yield list(self._drain())
        if self.options.stale_kv:
            self._updates += 1
        else:
            self._core.reset_prefix_cache(reset_running_requests=True)
        self._core.resume_scheduler()

    def sleep(self) -> None:
        """Free device memory. Live weights are dropped (vLLM's level 2; `load` must follow `wake`), frozen
        ones move to the host (level 1). On a CPU only the prefix cache can be freed.
        """
        if self._running:
            raise RuntimeError("vLLM cannot sleep while requests run")
        self._core.reset_prefix_cache()
        if self.options.cuda:
            self._client.sleep(level=2 if self.options.live_weights else 1)

    def wake(self) -> None:
        if self.options.cuda:
            self._client.wake_up(None)

    def _drain(self) -> Iterator[Any]:
        """Outputs of batches that vLLM has in flight (asynchronous scheduling on CUDA; none on a CPU)."""
        while self._core.batch_queue:
            yield from self._advance()

    def _drop_batches(self) -> None:
        """Finish batches of requests that ended or were aborted, and discard what they sample."""
        for _ in self._drain():
            pass

    def _rpc(self, method: str, *args: Any) -> None:
        self._client.collective_rpc(method, args=args)


@contextlib.contextmanager
def logged_causes() -> Iterator[list[str]]:
    """The last line of every error that vLLM logs while it inspects a model; the exception that it raises
    only points to the log.
    """
    causes: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
        causes.extend(lines[-1:])
        return True

    registry = logging.getLogger("vllm.model_executor.models.registry")
    registry.addFilter(keep)  # not a handler: vLLM removes those when it configures its logging
    try:
        yield causes
    finally:
        registry.removeFilter(keep)


def _environment(options: VllmOptions) -> None:
    """Set the variables that vLLM reads at import. It runs in our own worker, so nothing else sees them."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_NO_USAGE_STATS="1",
        VLLM_HOST_IP="127.0.0.1",  # tensor-parallel ranks meet on this machine
        FOPD_ENGINE_PARENT=str(os.getpid()),
    )
    if options.hidden:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # programs read fopd's stdout
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    if not options.cuda:
        # vLLM would pin threads to cores that our other workers also use; OMP_NUM_THREADS is already set.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_args(options: VllmOptions) -> dict[str, Any]:
    """The keyword arguments of vLLM's `EngineArgs` and `LLM`."""
    args: dict[str, Any] = {
        "model": options.model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # only the recipe says how to sample
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_model_len": options.max_tokens,
        "max_num_seqs": options.max_requests,
        "max_logprobs": options.max_logprobs,
        "logprobs_mode": "processed_logprobs",  # of the distribution actually sampled from
        "enable_prefix_caching": options.prefix_caching,
        "tensor_parallel_size": options.section.tensor_parallel,
        "gpu_memory_utilization": options.section.gpu_memory or GPU_MEMORY,
        "enforce_eager": options.section.eager or not options.cuda,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if options.seeded and not options.cuda:
        # With chunked prefill, vLLM rewinds the random generator, which fails for generators on a CPU.
        args["enable_chunked_prefill"] = False
        args["max_num_batched_tokens"] = max(
            options.max_batched_tokens or 4096, options.max_requests, options.max_tokens
        )
    elif options.max_batched_tokens is not None:
        args["max_num_batched_tokens"] = max(options.max_batched_tokens, options.max_requests)
    if options.adapter is not None:
        sizes = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's buffers come in these
        fitting = next((size for size in sizes if size >= options.adapter.rank), options.adapter.rank)
        args |= {"enable_lora": True, "max_lora_rank": fitting, "max_loras": 1, "max_cpu_loras": 1}
    if options.hidden:  # the learner computes the logits
        args["worker_extension_cls"] = "fopd_cli.engines.vllm.hidden.HiddenStates"
    elif options.vocab is not None:
        args["worker_extension_cls"] = "fopd_cli.engines.vllm.vocabulary.SharedVocabulary"
    if options.live_weights:
        args["weight_transfer_config"] = {"backend": "fopd"}
    if options.cuda:
        args["enable_sleep_mode"] = True
    return args


def _message(error: ValueError) -> str:
    """The line of vLLM's or pydantic's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next(
        (line for line in lines if any(word in line for word in TELLING)), lines[0] if lines else "?"
    )
    return telling.removeprefix("Value error, ").split(" [type=")[0][:400]
