"""Distillation losses. Pure tensor code: `divergence.py` the mathematics, `chunked.py` the memory."""
