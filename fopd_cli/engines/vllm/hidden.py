"""Inside vLLM's workers: the hidden states of prompts are kept, post-norm, as the output head would take
them.

vLLM's own extraction writes files, before the norm. Its model runner, however, hands the states of each step
to the function that makes prompt log-probs of them; there they are taken, by request, and moved to the host.
This is the first of vLLM's two model runners (V1), which `engine.py` asks for where hidden states are wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HiddenStates:
    """A worker extension of vLLM's: these become methods of its workers."""

    def keep_hidden_states(self) -> None:
        """Of all prompts from now on, until they are taken."""
        runner: Any = getattr(self, "model_runner")  # noqa: B009 (the worker's own)
        kept: dict[str, list[Tensor]] = {}
        own = runner._get_prompt_logprobs_dict

        def noted(hidden: Tensor, scheduled: dict[str, int]) -> Any:
            for name, count in scheduled.items():
                request = runner.requests[name]
                begun = request.num_computed_tokens
                if begun == 0:  # also one that was set back and is computed anew
                    kept[name] = []
                if begun < len(request.prompt_token_ids):
                    at = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]])
                    kept[name].append(hidden[at : at + count].to("cpu"))
            return own(hidden, scheduled)

        runner._get_prompt_logprobs_dict = noted
        self._kept = kept

    def take_hidden_states(self, name: str) -> Tensor:
        """`(prompt, hidden)` of a request that has ended."""
        return torch.cat(self._kept.pop(name))
