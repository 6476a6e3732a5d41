"""The student sampler on plain transformers: runs anywhere, and is the reference for the vLLM one.

Requests are decoded in batches of up to `batch_size` rows with a KV cache. A row that finishes leaves at once
and the batch shrinks around those that go on; waiting requests join when it is empty. New weights can be
loaded between any two tokens: the cache is recomputed with them, so that every token's log-prob is that of
one whole version. So it is where a row grows past a switch of its rotary embedding: its older keys were made
with other factors.

Rows of several lengths are padded on the left. Where a model does not bear that (`support.py`: a state from
token to token, say, which padding would be part of), its rows are decoded in batches of one length. What has
no cache that we know runs over all tokens each time.

Each row draws from its own generator (one uniform a token, inverse transform), so a rollout depends on its
seed, prompt and weights, not on its neighbours (up to the kernels' rounding for a batch of another shape).
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.models.hf import TokenRules
from fopd_cli.engines.models.support import bears_no_padding
from fopd_cli.engines.resting import Resting
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.rows import Row
from fopd_cli.engines.transformers import cpu_attention
from fopd_cli.samples import Request, Rollout, SamplingParams


@dataclass
class _Row(Row):
    """One running request, and its random numbers."""

    uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))  # float64 (max_new_tokens,)
    more: np.ndarray = field(default_factory=lambda: np.empty(0))  # float64 (max_new_tokens, draws - 1)

    @classmethod
    def of(cls, request: Request) -> _Row:
        n, draws = request.params.max_new_tokens, request.params.draws
        # A stream of their own: a response is the same however many draws are made beside it.
        own, beside = (
            np.random.Generator(np.random.PCG64(seed)) for seed in (request.seed, [request.seed, 1])
        )
        return cls(request, uniforms=own.random(n), more=beside.random((n, draws - 1)))


class TransformersSampler:
    """Implements `protocols.Sampler`. `model` is a causal LM on `device`; its weights are replaced by `load`.

    Ids from `vocab` on, which the teacher does not have, are never sampled: log-probs are of what is left.
    None: all are.
    """

    def __init__(
        self, model: Any, rules: TokenRules, device: torch.device, batch_size: int, vocab: int | None = None
    ) -> None:
        if device.type == "cpu":
            cpu_attention.enable(model)
        self._resting = Resting(device, forgetful=True)
        self.vocab = vocab
        self.model, self.rules, self.device, self.batch_size = (
            model.to(device).eval(),
            rules,
            device,
            batch_size,
        )
        self.version = 0
        # Some architectures know no positions, or no cache.
        self._takes = set(inspect.signature(model.forward).parameters)
        self._one_length = bears_no_padding(model.config)
        self._by_length = rope.by_length(model.config)
        self._factors: list[
            tuple[int, ...]
        ] = []  # of each row's rotary embedding, when the cache was written
        self._waiting: deque[Request] = deque()
        self._rows: list[_Row] = []
        self._ids = torch.empty(0)  # (rows, prompt + generated), left-padded
        self._mask = torch.empty(0)  # (rows, prompt + generated), 0 on padding
        self._cache: Any = None  # None: the next step runs over all of `_ids`

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def abort(self) -> None:
        self._waiting.clear()
        self._rows, self._cache = [], None

    @torch.no_grad()
    def load(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = self.model.state_dict(keep_vars=True)
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.version, self._cache = version, None

    def sleep(self) -> None:
        self._cache = None
        if self.device.type != "cpu":
            self._resting.sleep(self.model)
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self.device.type != "cpu":
            self._resting.wake(self.model)

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        if not self._rows:
            if not self._waiting:
                return []
            self._start()
        logits = self._forward()
        chosen = self._choose(logits)
        finished = self._finish(chosen)
        self._shrink()
        return finished

    def _start(self) -> None:
        requests = self._next_batch()
        self._rows = [_Row.of(r) for r in requests]
        width = max(len(r.token_ids) for r in requests)
        ids = np.full((len(requests), width), self.rules.pad, dtype=np.int64)
        mask = np.zeros((len(requests), width), dtype=np.int64)
        for i, request in enumerate(requests):
            ids[i, width - len(request.token_ids) :] = request.token_ids
            mask[i, width - len(request.token_ids) :] = 1
        self._ids = torch.from_numpy(ids).to(self.device)
        self._mask = torch.from_numpy(mask).to(self.device)
        self._cache = None

    def _next_batch(self) -> list[Request]:
        """The requests that have waited longest; of one length, if they must be."""
        wanted = len(self._waiting[0].token_ids) if self._one_length else None
        batch: list[Request] = []
        left: deque[Request] = deque()
        for request in self._waiting:
            fits = len(batch) < self.batch_size and (wanted is None or len(request.token_ids) == wanted)
            (batch if fits else left).append(request)
        self._waiting = left
        return batch

    def _forward(self) -> Tensor:
        """Logits `(rows, V)` of the next token over the ids that the pair shares, in float32."""
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        if self._by_length:
            lengths = [len(row.request.token_ids) + len(row.ids) for row in self._rows]
            factors = [rope.factors_of(self.model.config, length) for length in lengths]
            if factors != self._factors:
                self._cache = None
            self._factors = factors
        fresh, cached = self._cache is None, "past_key_values" in self._takes
        inputs = {
            "input_ids": self._ids if fresh else self._ids[:, -1:],
            "attention_mask": self._mask,
            "position_ids": positions if fresh else positions[:, -1:],
            "past_key_values": self._cache,
            "use_cache": cached,
            "logits_to_keep": 1,
        }
        out = self.model(**{name: value for name, value in inputs.items() if name in self._takes})
        self._cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1, : self.vocab].float()

    def _choose(self, logits: Tensor) -> np.ndarray:
        """Sample one token a row and note its log-prob; returns the ids `(rows,)`."""
        params = [row.request.params for row in self._rows]
        uniforms = torch.tensor([row.uniforms[len(row.ids)] for row in self._rows], device=self.device)
        logprobs = behaviour_logprobs(logits, params)
        chosen = inverse_transform(logprobs, uniforms[:, None])[:, 0]
        picked = logprobs.gather(-1, chosen[:, None])[:, 0].cpu().numpy()
        self._ids = torch.cat([self._ids, chosen[:, None]], -1)
        self._mask = torch.cat([self._mask, torch.ones_like(chosen)[:, None]], -1)
        self._draw_more(logprobs)
        ids = chosen.cpu().numpy()
        for row, token, logprob in zip(self._rows, ids, picked, strict=True):
            row.append(int(token), float(logprob), self.version)
        self._keep_topk(logprobs, params[0].keep_topk)
        return ids

    def _draw_more(self, logprobs: Tensor) -> None:
        if self._rows[0].request.params.draws == 1:
            return
        uniforms = torch.from_numpy(np.stack([row.more[len(row.ids)] for row in self._rows])).to(self.device)
        drawn = inverse_transform(logprobs, uniforms)
        values = logprobs.gather(-1, drawn).cpu().numpy()
        for row, ids, value in zip(self._rows, drawn.int().cpu().numpy(), values, strict=True):
            row.extras["draw_ids"].append(ids)
            row.extras["draw_logprobs"].append(value)

    def _keep_topk(self, logprobs: Tensor, k: int) -> None:
        if k == 0:
            return
        if k < 0:
            for row, full in zip(self._rows, logprobs.cpu().numpy(), strict=True):
                row.extras["topk_logprobs"].append(full)
            return
        values, ids = logprobs.topk(k, -1)
        for row, value, index in zip(self._rows, values.cpu().numpy(), ids.int().cpu().numpy(), strict=True):
            row.extras["topk_logprobs"].append(value)
            row.extras["topk_ids"].append(index)

    def _finish(self, chosen: np.ndarray) -> list[Rollout]:
        finished = []
        for row, token in zip(self._rows, chosen, strict=True):
            if int(token) in self.rules.eos:
                finished.append(row.rollout("stop"))
            elif len(row.ids) == row.request.params.max_new_tokens:
                finished.append(row.rollout("length"))
        return finished

    def _shrink(self) -> None:
        """Take finished rows out of the batch and its cache."""
        keep = [i for i, row in enumerate(self._rows) if not self._done(row)]
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in keep]
        if not keep:
            self._cache = None
            return
        index = torch.tensor(keep, device=self.device)
        self._ids, self._mask = self._ids[index], self._mask[index]
        self._factors = [self._factors[i] for i in keep if self._by_length]
        if self._cache is not None:
            self._cache = _kept_rows(self._cache, index)

    def _done(self, row: _Row) -> bool:
        return row.ids[-1] in self.rules.eos or len(row.ids) == row.request.params.max_new_tokens


def _kept_rows(cache: Any, index: Tensor) -> Any:
    """The cache without all other rows; None if it is of a kind of the architecture's own, which may hold
    more than we know.
    """
    if {type(part).__module__ for part in (cache, *cache.layers)} != {"transformers.cache_utils"}:
        return None
    if any(hasattr(layer, "conv_states") for layer in cache.layers):
        # the only one that recurrent states know; it takes fewer rows just as well
        cache.reorder_cache(index)
    else:
        cache.batch_select_indices(index)
    return cache


def behaviour_logprobs(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Log-probs `(rows, V)` of the distribution really sampled from: temperature, then top-p, renormalised.

    Temperature 0 means greedy: all mass on the likeliest token.
    """
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)[:, None]
    greedy = temperature == 0
    logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature), -1)
    if any(p.top_p < 1 for p in params):
        top_p = torch.tensor([p.top_p for p in params], device=logits.device)[:, None]
        ordered, index = logprobs.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass above each token; the first one always stays
        kept = torch.where(before < top_p, ordered, -torch.inf)
        logprobs = torch.log_softmax(torch.empty_like(kept).scatter(-1, index, kept), -1)
    if greedy.any():
        best = torch.full_like(logprobs, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
        logprobs = torch.where(greedy, best, logprobs)
    return logprobs


def inverse_transform(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Ids `(rows, draws)`: the first token whose cumulative probability exceeds the uniform in [0, 1)."""
    cumulative = logprobs.exp().double().cumsum(-1)
    threshold = uniforms.double() * cumulative[:, -1:]  # the sum is 1 only up to rounding
    return torch.searchsorted(cumulative, threshold, right=True).clamp(max=logprobs.shape[-1] - 1)
