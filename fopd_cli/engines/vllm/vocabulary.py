"""Inside vLLM's workers: ids that student and teacher do not share have no probability, sampled or judged.

Logits are masked where the model makes them. So it holds for every way of sampling and for prompt log-probs,
and all log-probs are of the distribution over the ids that are left. (`allowed_token_ids` would be a list of
the whole vocabulary a request, and says nothing of prompt log-probs.)
"""

from __future__ import annotations

from typing import Any


class SharedVocabulary:
    """A worker extension of vLLM's: `share_vocabulary` becomes a method of its workers."""

    def share_vocabulary(self, vocab: int) -> None:
        """Ids from `vocab` on are never again."""
        runner: Any = getattr(self, "model_runner")  # noqa: B009 (the worker's own)
        model = runner.get_model()
        own = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = own(*args, **kwargs)
            if logits is not None:  # it is on all ranks but the one that samples
                logits[..., vocab:] = -float("inf")
            return logits

        model.compute_logits = compute_logits
