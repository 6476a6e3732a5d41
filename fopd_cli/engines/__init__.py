"""Engines: the sampler, the teacher and the learner. Only this package imports transformers (and vllm)."""
