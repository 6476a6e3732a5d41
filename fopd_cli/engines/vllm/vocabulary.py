"""Inside vLLM's workers: ids that student and teacher do not share get zero probability everywhere.

Logits are masked where the model computes them. This covers every way of sampling and prompt log-probs, and
all log-probs are normalized over the remaining ids. (`allowed_token_ids` would need a list of the whole
vocabulary in each request, and does not affect prompt log-probs.)
"""

from __future__ import annotations

from typing import Any


class SharedVocabulary:
    """A vLLM worker extension: `share_vocabulary` becomes a method of its workers."""

    def share_vocabulary(self, vocab: int) -> None:
        """From now on, mask ids from `vocab` up."""
        runner: Any = getattr(self, "model_runner")  # noqa: B009 (the worker's own)
        model = runner.get_model()
        own = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = own(*args, **kwargs)
            if logits is not None:  # None on all ranks but the one that samples
                logits[..., vocab:] = -float("inf")
            return logits

        model.compute_logits = compute_logits
