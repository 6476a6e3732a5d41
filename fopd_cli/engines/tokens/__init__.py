"""Sequences as tensors: packed rows, shared prefixes, masks and positions, groups of even size."""
