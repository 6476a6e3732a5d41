"""Sampler and teacher on vLLM."""
