"""Sampler and teacher on plain transformers."""
