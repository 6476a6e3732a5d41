"""Bytes: what the teacher targets' arena needs, what this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from fopd_cli.recipe import Recipe
from fopd_cli.samples import TargetSpec

# One batch being trained or measured, one urgent one being scored, one for the holes that first-fit leaves.
SMALLEST_BATCHES = 3
SHM = Path("/dev/shm")


def arena_bytes(recipe: Recipe, specs: Sequence[TargetSpec]) -> int:
    """Bytes of shared memory for teacher targets. With room for three worst-case batches, a run cannot stall
    for lack of it.
    """
    response = max(recipe.sampler.max_new_tokens, recipe.eval.max_new_tokens or 0)
    batch = recipe.learner.batch_samples * (max(spec.nbytes(response) for spec in specs) + 64)
    smallest = SMALLEST_BATCHES * batch
    asked = [t.buffer_gb for t in recipe.teachers if t.buffer_gb is not None]
    if asked:
        return max(smallest, int(max(asked) * 1e9))
    wanted = (recipe.max_lag + 2) * batch
    return max(smallest, min(wanted, total_memory() // 4))


def total_memory() -> int:
    """RAM of this machine."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """RAM available now without swapping."""
    return int(psutil.virtual_memory().available)


def free_shared_memory() -> int:
    """What /dev/shm can still take; Docker gives it 64 MB unless told otherwise."""
    return shutil.disk_usage(SHM).free if SHM.is_dir() else total_memory()
