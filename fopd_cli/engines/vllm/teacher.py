"""The frozen teacher on vLLM: top-k log-probs, or those of the sampled tokens, at every response position.

vLLM calls them prompt log-probs: the whole sample is a prompt, and one token that nobody wants is generated.
They are computed per chunk of `max_batched_tokens`, whose `[tokens, vocab]` logits vLLM's memory profile does
not foresee: the cap is what keeps long contexts from killing the engine. Prefix caching is off, because a
cached position has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fopd_cli.engines.vllm.engine import VllmEngine, VllmOptions
from fopd_cli.samples import Rollout, TeacherTargets


class VllmTeacher:
    """Implements `protocols.Teacher`. Where its vocabulary is larger than the student's, `options.vocab` says
    so.
    """

    def __init__(self, options: VllmOptions) -> None:
        self.engine = VllmEngine(options)

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        asked = {}
        for rollout, target in zip(rollouts, targets, strict=True):
            k = 0 if target.topk_logprobs is None else target.topk_logprobs.shape[-1]
            name = self.engine.add(
                rollout.judged.token_ids, temperature=1.0, max_tokens=1, prompt_logprobs=k, ignore_eos=True
            )
            asked[name] = rollout, target
        while self.engine.busy:
            for output in self.engine.step():
                self._fill(output.new_prompt_logprobs_tensors, *asked[output.request_id])

    def head(self) -> None:
        """vLLM's stays inside."""

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def _fill(self, found: Any, rollout: Rollout, target: TeacherTargets) -> None:
        """`found` has a row for every token but the first: the token's own log-prob, then the likeliest
        tokens'.
        """
        # A position that the context does not have gets some row; nobody reads it.
        rows = torch.from_numpy(rollout.judged.positions.clip(min=1) - 1)
        assert target.logprobs is not None
        target.logprobs.copy_(found.logprobs[rows, 0])
        if target.topk_logprobs is not None and target.topk_ids is not None:
            likeliest = slice(1, 1 + target.topk_ids.shape[-1])
            target.topk_logprobs.copy_(torch.as_tensor(found.logprobs)[rows, likeliest])
            target.topk_ids.copy_(torch.as_tensor(found.logprob_token_ids)[rows, likeliest])
