"""The student sampler on vLLM: continuous batching, live weights, log-probs of the distribution actually
sampled from.

A request joins the running batch at the next token and leaves it at its last one; nothing waits for a batch
to fill or drain. Each request has its own generator in vLLM, so a rollout depends on its seed, prompt and
weights (and, as on any engine, on how the kernels round for the current batch). Tokens go in and come out as
ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fopd_cli.engines.learner import lora
from fopd_cli.engines.models.hf import TokenRules
from fopd_cli.engines.tokens.rows import Row
from fopd_cli.engines.vllm.engine import VllmEngine, VllmOptions
from fopd_cli.samples import Request, Rollout


class VllmSampler:
    """Implements `protocols.Sampler`. `aliases` are the other names of tied weights (`hf.tied_names`)."""

    def __init__(self, options: VllmOptions, rules: TokenRules, aliases: dict[str, str]) -> None:
        self.engine = VllmEngine(options)
        self.stop, self.aliases = sorted(rules.eos), aliases
        self.version = self.joins = 0
        self._rows: dict[str, Row] = {}  # by vLLM's request id
        self._late: list[Rollout] = []  # finished by a step that a weight update waited for

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._late)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            p = request.params
            name = self.engine.add(
                request.token_ids,
                temperature=p.temperature,
                top_p=p.top_p,
                max_tokens=p.max_new_tokens,
                seed=request.seed,
                logprobs=p.keep_topk,
                stop_token_ids=self.stop,
                ignore_eos=True,
            )
            self._rows[name] = Row(request)

    def step(self) -> list[Rollout]:
        finished, self._late = self._late, []
        if self.engine.busy:
            finished += self._take(self.engine.step())
        return finished

    def abort(self) -> None:
        self.engine.abort()
        self._rows.clear()
        self._late.clear()

    def load(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        if (adapter := self.engine.options.adapter) is not None:
            with tempfile.TemporaryDirectory(prefix="fopd-adapter-", dir="/dev/shm") as folder:
                lora.write_adapter(Path(folder), weights, adapter.alpha)
                late = self.engine.load_adapter(folder)
        else:
            from fopd_cli.engines.vllm.weights import WithAliases  # imports vllm

            late = self.engine.load(WithAliases(weights, self.aliases, self.engine.options.model))
        self._late += self._take(late)
        self.version = version

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def _take(self, outputs: Sequence[Any]) -> list[Rollout]:
        """Append what a step sampled; returns the rollouts that it finished."""
        finished = []
        for output in outputs:
            row = self._rows.get(output.request_id)
            if row is None:
                continue  # aborted in the meantime
            self._append(row, output)
            if output.finished:
                del self._rows[output.request_id]
                finish: Literal["stop", "length"] = (
                    "stop" if str(output.finish_reason) == "stop" else "length"
                )
                finished.append(row.rollout(finish, self.engine.options.stale_kv))
        return finished

    def _append(self, row: Row, output: Any) -> None:
        """vLLM returns `(tokens, 1 + k)` ids and log-probs: the sampled token, then the k likeliest."""
        params = row.request.params
        ids, logprobs = output.new_logprobs.logprob_token_ids, output.new_logprobs.logprobs
        if params.temperature == 0:  # greedy: all mass on the chosen token
            logprobs = np.where(ids == np.asarray(output.new_token_ids)[:, None], np.float32(0), -np.inf)
        for i, token in enumerate(output.new_token_ids):
            row.append(token, float(logprobs[i, 0]), self.version)
            if params.keep_topk > 0:
                row.extras["topk_ids"].append(ids[i, 1 : params.keep_topk + 1].copy())
                row.extras["topk_logprobs"].append(logprobs[i, 1 : params.keep_topk + 1].copy())
            elif params.keep_topk < 0:
                everything = np.empty(ids.shape[1] - 1, dtype=np.float32)
                everything[ids[i, 1:]] = logprobs[i, 1:]
                row.extras["topk_logprobs"].append(everything)
