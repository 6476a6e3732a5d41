"""Shared memory: teacher targets (`arena.py`), weights (`weights.py`), and how much of it there must be."""
