"""Shared memory: teacher targets (`arena.py`), weights (`weights.py`), and how much memory a run needs."""
