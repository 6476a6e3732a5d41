"""The frozen teacher on vLLM: hidden states, top-k log-probs, or those of the sampled tokens, at every
response position.

Hidden states are the inputs of vLLM's own head (`hidden.py`). At start we check that the head in the model's
files turns them into vLLM's log-probs, because vLLM may implement what lies between differently from other
libraries.

Log-probs are vLLM's prompt log-probs: the whole sample is the prompt, and the one generated token is ignored.
They are computed in chunks of `max_batched_tokens`. vLLM's memory profile does not include a chunk's
`[tokens, vocab]` logits, so this cap keeps long contexts from killing the engine. Prefix caching is off,
because cached positions have no log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.vllm.engine import VllmEngine, VllmOptions
from fopd_cli.errors import UserError
from fopd_cli.losses.head import Head
from fopd_cli.samples import Rollout, TeacherTargets

PROBE = 24  # tokens
PROBE_TOLERANCE = {torch.float32: 1e-3}  # nats


class VllmTeacher:
    """Implements `protocols.Teacher`. `options.vocab` is set if it has more ids than the pair shares."""

    def __init__(self, options: VllmOptions, head: Head | None = None, vocab: int | None = None) -> None:
        self.engine = VllmEngine(options)
        if head is not None:
            self._check(head)
            head = head.first(head.vocab if vocab is None else vocab)
        self._head = head

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        asked = {}
        for rollout, target in zip(rollouts, targets, strict=True):
            k = 0 if target.topk_logprobs is None else target.topk_logprobs.shape[-1]
            name = self._ask(rollout.judged.token_ids, None if target.hidden is not None else k)
            asked[name] = rollout, target
        while self.engine.busy:
            for output in self.engine.step():
                rollout, target = asked[output.request_id]
                # Positions that are not in the context get an arbitrary row, which is never read.
                rows = torch.from_numpy(rollout.judged.positions.clip(min=1) - 1)
                if target.hidden is not None:
                    target.hidden.copy_(self.engine.take_hidden(output.request_id)[rows])
                else:
                    self._fill(output.new_prompt_logprobs_tensors, rows, target)

    def head(self) -> Head | None:
        """The output head; None unless hidden states are handed over."""
        return self._head

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def _ask(self, ids: np.ndarray, k: int | None) -> str:
        return self.engine.add(ids, temperature=1.0, max_tokens=1, prompt_logprobs=k, ignore_eos=True)

    def _check(self, head: Head) -> None:
        """Raise `UserError` unless the hidden states and the head reproduce vLLM's own log-probs."""
        options = self.engine.options
        ids = np.arange(min(PROBE, options.max_tokens - 1), dtype=np.int32) % head.vocab
        name, outputs = self._ask(ids, 0), []
        while self.engine.busy:
            outputs += self.engine.step()
        own = torch.as_tensor(outputs[0].new_prompt_logprobs_tensors.logprobs)[:, 0]
        # vLLM's head runs in the engine's dtype, so its logits are rounded
        logits = head.to(options.dtype).logits(self.engine.take_hidden(name)[:-1])
        made = torch.log_softmax(logits, -1).gather(-1, torch.from_numpy(ids[1:, None]).long())[:, 0]
        if float((made - own).abs().max()) > PROBE_TOLERANCE.get(options.dtype, 0.1):
            raise UserError(
                f"teacher.engine: vllm does something between the hidden states of {options.model!r} and its "
                "logits that fopd does not know; set teacher.engine: transformers, or teacher.targets: topk"
            )

    def _fill(self, found: Any, rows: Tensor, target: TeacherTargets) -> None:
        """`found` has a row for every token but the first: its own log-prob, then those of the likeliest."""
        assert target.logprobs is not None
        target.logprobs.copy_(found.logprobs[rows, 0])
        if target.topk_logprobs is not None and target.topk_ids is not None:
            likeliest = slice(1, 1 + target.topk_ids.shape[-1])
            target.topk_logprobs.copy_(torch.as_tensor(found.logprobs)[rows, likeliest])
            target.topk_ids.copy_(torch.as_tensor(found.logprob_token_ids)[rows, likeliest])
