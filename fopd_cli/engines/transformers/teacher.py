"""The frozen teacher on plain transformers: hidden states, top-k log-probs or the sampled tokens' log-probs.

On several devices it is sharded with `fully_shard`. All ranks then score together, each its own rollouts, and
a rank with fewer batches joins in with a dummy row, because all of them must gather the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fopd_cli.engines.models.heads import HeadRule
from fopd_cli.engines.models.hf import blocks, head_rule
from fopd_cli.engines.models.shards import Unread
from fopd_cli.engines.resting import Resting
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.batching import by_token_budget
from fopd_cli.engines.tokens.packing import check_looks_back, check_packing
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing
from fopd_cli.losses.head import Head
from fopd_cli.samples import Rollout, TeacherTargets

HEAD_CHUNK_BYTES = 256 << 20  # of one float32 [positions, vocab] tensor


class _HiddenAndHead(nn.Module):
    """Tokens -> post-norm hidden states `(rows x width, hidden)` and the head.

    A module, so that `fully_shard` gathers the head together with the rest of the root.
    """

    def __init__(self, lm: Any, rule: HeadRule) -> None:
        super().__init__()
        self.lm, self.rule = lm, rule

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Head]:
        return batch.hidden(self.lm), self.rule.head(self.lm)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Only the hidden states; if the model is sharded, a forward of its own."""
        return batch.hidden(self.lm)


class TransformersTeacher:
    """Implements `protocols.Teacher`. `unread`: the model is on the meta device, and its weights are read
    after sharding.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        world: int,
        micro_tokens: int,
        vocab: int,
        longest: int,
        packing: bool = True,
        student_k: int = 0,
        unread: Unread | None = None,
    ) -> None:
        self.device, self.world, self.micro_tokens, self.packing = device, world, micro_tokens, packing
        self._resting = Resting(device)
        self.vocab = vocab  # logits past it are padding and are cut off
        self.student_k = student_k  # of the top-k targets, this many ids are the student's own likeliest
        self.shared = not rope.by_length(model.config)
        if packing:
            enable_packing(model)
        rule = head_rule(model.config, "teacher.model")
        self.model = _HiddenAndHead(model.eval().requires_grad_(False), rule)
        if world > 1:
            mesh = dist.init_device_mesh(device.type, (world,))
            for block in blocks(model):
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            register_fsdp_forward_method(self.model, "hidden")
            if unread is not None:
                unread.fill(self.model, model, device)
        elif unread is not None:
            unread.place(self.model, model, device)
        else:
            self.model.to(device)
        if unread is not None:
            check_looks_back(self.model.hidden, model, device, "teacher.model")
        if packing:
            check_packing(self.model.hidden, model, vocab, longest, device, "teacher.packing")

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        batches = by_token_budget(
            [len(r.judged.token_ids) for r in rollouts], self.micro_tokens, self.packing
        )
        # Agreed on before any forward: a rank without batches would wait here for one that waits in its first
        # all-gather.
        most = self._most(len(batches))
        for indices in batches:
            self._score_batch([rollouts[i] for i in indices], [targets[i] for i in indices])
        for _ in range(most - len(batches)):
            self.model(TokenBatch.of([np.zeros(2, dtype=np.int32)], self.packing, self.device))

    @torch.no_grad()
    def head(self) -> Head:
        head = self.model.rule.head(self.model.lm)
        bias = None if head.bias is None else _whole(head.bias)
        return replace(head, weight=_whole(head.weight), bias=bias).first(self.vocab)

    def sleep(self) -> None:
        if self.device.type != "cpu":
            self._resting.sleep(self.model)
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self.device.type != "cpu":
            self._resting.wake(self.model)

    def _most(self, count: int) -> int:
        if self.world == 1:
            return count
        counts = torch.tensor([count], device=self.device)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)

    def _score_batch(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        contexts = [r.judged for r in rollouts]
        batch = TokenBatch.of([c.token_ids for c in contexts], self.packing, self.device, self.shared)
        hidden, head = self.model(batch)
        for places, context, rollout, target in zip(batch.places, contexts, rollouts, targets, strict=True):
            # A position that the context lacks gets an arbitrary row, which is never read.
            rows = hidden[torch.from_numpy(places[context.positions.clip(min=1) - 1]).to(self.device)]
            if target.hidden is not None:
                target.hidden.copy_(rows)
            else:
                self._score_head(rows, head.first(self.vocab), rollout, target)

    def _score_head(self, hidden: Tensor, head: Head, rollout: Rollout, target: TeacherTargets) -> None:
        assert target.logprobs is not None
        chunk = max(1, HEAD_CHUNK_BYTES // (4 * head.vocab))
        tokens = torch.from_numpy(rollout.response_ids).to(self.device, torch.int64)
        own = _likeliest(rollout, self.student_k).to(self.device)
        for i in range(0, len(tokens), chunk):
            at = slice(i, i + chunk)
            logprobs = torch.log_softmax(head.logits(hidden[at]), -1)
            target.logprobs[at] = logprobs.gather(-1, tokens[at, None])[:, 0]
            if target.topk_logprobs is not None:
                assert target.topk_ids is not None
                # All ids of a row differ: the student's first, then the teacher's likeliest of the others.
                others = logprobs.scatter(-1, own[at], -torch.inf)
                rest = others.topk(target.topk_logprobs.shape[-1] - own.shape[-1], -1).indices
                ids = torch.cat([own[at], rest], -1)
                target.topk_logprobs[at] = logprobs.gather(-1, ids)
                target.topk_ids[at] = ids.int()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _likeliest(rollout: Rollout, k: int) -> Tensor:
    """int64 `(n, k)`: the student's likeliest tokens when it sampled."""
    if k == 0:
        return torch.empty(rollout.response_length, 0, dtype=torch.int64)
    assert rollout.topk_logprobs is not None
    order = torch.from_numpy(rollout.topk_logprobs).topk(k, -1).indices
    return order if rollout.topk_ids is None else torch.from_numpy(rollout.topk_ids).long().gather(-1, order)
