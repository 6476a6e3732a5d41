"""Inside vLLM's workers: keeps the hidden states of prompts, post-norm, as the output head would see them.

vLLM's own extraction writes pre-norm states to files. But its model runner passes each step's states to the
function that computes prompt log-probs. We intercept them there, by request, and move them to the host.
This works with the first of vLLM's two model runners (V1), which `engine.py` selects for hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HiddenStates:
    """A vLLM worker extension: these become methods of its workers."""

    def keep_hidden_states(self) -> None:
        """Keep the hidden states of all prompts from now on, until they are taken."""
        runner: Any = getattr(self, "model_runner")  # noqa: B009 (the worker's own)
        kept: dict[str, list[Tensor]] = {}
        own = runner._get_prompt_logprobs_dict

        def noted(hidden: Tensor, scheduled: dict[str, int]) -> Any:
            for name, count in scheduled.items():
                request = runner.requests[name]
                begun = request.num_computed_tokens
                if begun == 0:  # also when a preempted request starts over
                    kept[name] = []
                if begun < len(request.prompt_token_ids):
                    at = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
                    kept[name].append(hidden[at : at + count].to("cpu"))
            return own(hidden, scheduled)

        runner._get_prompt_logprobs_dict = noted
        self._kept = kept

    def take_hidden_states(self, name: str) -> Tensor:
        """`(prompt, hidden)` of a finished request."""
        return torch.cat(self._kept.pop(name))
