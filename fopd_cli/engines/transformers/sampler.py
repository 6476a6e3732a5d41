"""The student sampler on plain transformers: runs anywhere, and is the reference for the vLLM one.

Requests are decoded in batches of up to `batch_size` rows with a KV cache. A row that finishes leaves at once
and the batch shrinks to the others; waiting requests join them as soon as an eighth of the batch is free. New
weights can be loaded between any two tokens: the cache is recomputed with them, so that every token's
log-prob is that of one whole version (unless `stale_kv` says to keep the old keys and values). The same
happens when a row grows past a switch of its rotary embedding: its older keys were made with other factors.

No forward pass covers more than `prefill_tokens` tokens (or one per row): anything longer, the prompts of a
batch or all its rows after an update, is computed some columns at a time.

    ids      . . a b c d e|    columns of a batch, padded on the left
             . f g h i j k|
    cache    [ 1 ][ 2 ][3] ^   the last column is the ordinary step

Rows of different lengths are padded on the left. If a model cannot bear that (`support.py`: padding would
become part of a recurrent state, say), its rows are decoded in batches of one length, which nothing joins and
which are never split into columns. A model without a cache that we know runs over all tokens each time.

Each row draws from its own generator (one uniform per token, inverse transform), so a rollout depends on its
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
from fopd_cli.engines.models.shards import Unread
from fopd_cli.engines.models.support import bears_no_padding, reads_in_pieces
from fopd_cli.engines.resting import Resting
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.packing import check_looks_back
from fopd_cli.engines.tokens.rows import Row
from fopd_cli.engines.transformers import cpu_attention
from fopd_cli.engines.transformers.record import JOINS
from fopd_cli.samples import Request, Rollout, SamplingParams

PREFILL_TOKENS = 16384


@dataclass
class _Row(Row):
    """One running request and its random numbers."""

    uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))  # float64 (max_new_tokens,)
    more: np.ndarray = field(default_factory=lambda: np.empty(0))  # float64 (max_new_tokens, draws - 1)

    @classmethod
    def of(cls, request: Request) -> _Row:
        n, draws = request.params.max_new_tokens, request.params.draws
        # A separate stream for the extra draws: the response is the same however many there are.
        own, beside = (
            np.random.Generator(np.random.PCG64(seed)) for seed in (request.seed, [request.seed, 1])
        )
        return cls(request, uniforms=own.random(n), more=beside.random((n, draws - 1)))


class TransformersSampler:
    """Implements `protocols.Sampler`. `model` is a causal LM; its weights are replaced by `load`. `unread`:
    it is on the meta device, and its weights are read onto `device`.

    Ids from `vocab` up, which the teacher lacks, are never sampled: log-probs are over the rest. None: all
    are.
    """

    def __init__(
        self,
        model: Any,
        rules: TokenRules,
        device: torch.device,
        batch_size: int,
        vocab: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        stale_kv: bool = False,
        unread: Unread | None = None,
    ) -> None:
        self.prefill_tokens, self.stale_kv = prefill_tokens, stale_kv
        if device.type == "cpu":
            cpu_attention.enable(model)
        self._resting = Resting(device, forgetful=True)
        self.vocab = vocab
        self.joins = 0
        if unread is None:
            model.to(device)
        else:
            unread.place(model, model, device)
            check_looks_back(lambda batch: batch.hidden(model), model, device, "student.model")
        self.model, self.rules, self.device, self.batch_size = model.eval(), rules, device, batch_size
        self.version = 0
        # Some architectures take no positions, or no cache.
        self._takes = set(inspect.signature(model.forward).parameters)
        self._one_length = bears_no_padding(model.config)
        self._by_length = rope.by_length(model.config)
        self._in_pieces = reads_in_pieces(model)
        # of each row's rotary embedding, when the cache was written
        self._factors: list[tuple[int, ...]] = []
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
            own[name].copy_(tensor, non_blocking=True)
        if self.device.type != "cpu":
            torch.cuda.current_stream(self.device).synchronize()  # `weights` may be overwritten after this
        self.version = version
        if not self.stale_kv:
            self._cache = None

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
        self._admit()
        if not self._rows:
            return []
        logits = self._forward()
        chosen = self._choose(logits)
        finished = self._finish(chosen)
        self._shrink()
        return finished

    def _admit(self) -> None:
        """Let waiting requests start, or join."""
        if not self._waiting:
            return
        if not self._rows:
            self._start(self._next_batch())
        elif self.batch_size - len(self._rows) >= max(1, int(JOINS * self.batch_size)) and self._joinable():
            self._join(self._next_batch())

    def _start(self, requests: Sequence[Request]) -> None:
        self._rows = [_Row.of(r) for r in requests]
        self._ids, self._mask = self._padded(requests)
        self._cache = None

    def _joinable(self) -> bool:
        """Whether rows can be added to the running ones: a cache of plain keys and values, or none at all."""
        if self._one_length:
            return False
        return self._cache is None or (self._in_pieces and _plain(self._cache))

    def _join(self, requests: Sequence[Request]) -> None:
        """Add rows to the running ones, whose last column is computed next."""
        self.joins += 1
        ids, mask = self._padded(requests)
        width = max(int(self._mask.sum(-1).max()), ids.shape[1])
        if self._cache is not None:
            beside = self._filled(ids, mask)
            _put_beside(self._cache, beside, len(requests), width - 1)
        self._rows += [_Row.of(r) for r in requests]
        self._ids = torch.cat([_fitted(x, width, self.rules.pad) for x in (self._ids, ids)])
        self._mask = torch.cat([_fitted(x, width) for x in (self._mask, mask)])

    def _padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Prompts as ids and mask `(rows, longest)`."""
        width = max(len(r.token_ids) for r in requests)
        ids = np.full((len(requests), width), self.rules.pad, dtype=np.int64)
        mask = np.zeros((len(requests), width), dtype=np.int64)
        for i, request in enumerate(requests):
            ids[i, width - len(request.token_ids) :] = request.token_ids
            mask[i, width - len(request.token_ids) :] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _next_batch(self) -> list[Request]:
        """The requests that have waited longest, all of one length if they must be."""
        wanted = len(self._waiting[0].token_ids) if self._one_length else None
        batch: list[Request] = []
        left: deque[Request] = deque()
        for request in self._waiting:
            fits = len(batch) + len(self._rows) < self.batch_size and (
                wanted is None or len(request.token_ids) == wanted
            )
            (batch if fits else left).append(request)
        self._waiting = left
        return batch

    def _forward(self) -> Tensor:
        """Logits `(rows, V)` of the next token over the ids that student and teacher share, in float32."""
        if self._by_length:
            lengths = [len(row.request.token_ids) + len(row.ids) for row in self._rows]
            factors = [rope.factors_of(self.model.config, length) for length in lengths]
            if factors != self._factors:
                self._cache = None
            self._factors = factors
        if self._cache is None and self._in_pieces and self._ids.numel() > self.prefill_tokens:
            self._cache = self._filled(self._ids, self._mask)
        start = 0 if self._cache is None else self._ids.shape[1] - 1
        out = self._run(self._ids, self._mask, start, self._ids.shape[1], self._cache)
        self._cache = getattr(out, "past_key_values", None)
        return out.logits[:, -1, : self.vocab].float()

    def _filled(self, ids: Tensor, mask: Tensor) -> Any:
        """The cache of all columns but the last; None if there is only one, or the cache cannot be built in
        pieces.
        """
        cache, last = None, ids.shape[1] - 1
        columns = max(1, self.prefill_tokens // len(ids))
        for start in range(0, last, columns):
            out = self._run(ids, mask, start, min(start + columns, last), cache)
            cache = getattr(out, "past_key_values", None)
            if not _by_columns(cache):
                return None
        return cache

    def _run(self, ids: Tensor, mask: Tensor, start: int, stop: int, cache: Any) -> Any:
        """Run the model over some columns; `cache` covers those before them."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            "past_key_values": cache,
            "use_cache": "past_key_values" in self._takes,
            "logits_to_keep": 1,
        }
        return self.model(**{name: value for name, value in inputs.items() if name in self._takes})

    def _choose(self, logits: Tensor) -> np.ndarray:
        """Sample one token per row and record its log-prob; returns the ids `(rows,)`."""
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
                finished.append(row.rollout("stop", self.stale_kv))
            elif len(row.ids) == row.request.params.max_new_tokens:
                finished.append(row.rollout("length", self.stale_kv))
        return finished

    def _shrink(self) -> None:
        """Remove finished rows from the batch and its cache."""
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
    """The cache of only these rows; None if it is the architecture's own kind, which may hold more than we
    know.
    """
    if {type(part).__module__ for part in (cache, *cache.layers)} != {"transformers.cache_utils"}:
        return None
    if any(hasattr(layer, "conv_states") for layer in cache.layers):
        # the only way that recurrent states support; it takes fewer rows, too
        cache.reorder_cache(index)
    else:
        cache.batch_select_indices(index)
    return cache


def _plain(cache: Any) -> bool:
    """Whether it holds keys and values of every column, and nothing else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(cache) is not DynamicCache:
        return False
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def _by_columns(cache: Any) -> bool:
    """Whether it holds keys and values of at least the last columns, and any number can be added."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    known = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)


def _put_beside(cache: Any, other: Any, rows: int, width: int) -> None:
    """Add the rows of another cache (None: they have no column yet) and make both `width` columns wide."""
    for i, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            own = getattr(layer, name)
            new = own.new_zeros(rows, *own.shape[1:]) if other is None else getattr(other.layers[i], name)
            both = [_fitted(x.movedim(2, 1), width).movedim(1, 2) for x in (own, new)]
            setattr(layer, name, torch.cat(both))


def _fitted(columns: Tensor, width: int, padding: int = 0) -> Tensor:
    """`(rows, columns, ...)` cut off or padded on the left."""
    missing = width - columns.shape[1]
    if missing <= 0:
        return columns[:, -missing:]
    return torch.cat([columns.new_full((len(columns), missing, *columns.shape[2:]), padding), columns], 1)


def behaviour_logprobs(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Log-probs `(rows, V)` of the distribution actually sampled from: temperature, then top-p, renormalised.

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
