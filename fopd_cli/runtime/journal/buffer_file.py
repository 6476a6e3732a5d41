"""A checkpoint's buffer: rollouts and their teacher targets, in a safetensors file.

It is written by a thread, piece by piece, and hashed on the way. The library's own writer would copy all of
it first, gigabytes beside those in shared memory, and hold the interpreter meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fopd_cli.errors import UserError
from fopd_cli.runtime.memory.held import Held
from fopd_cli.samples import PER_TOKEN, Rollout

ARRAYS = ("token_ids", *PER_TOKEN)  # of a rollout
NAMES = {  # of dtypes, in the file's format
    "bool": "BOOL",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
ALIGNMENT = 8  # of the first tensor


def rollout_fields(rollouts: Iterable[Rollout]) -> list[dict[str, Any]]:
    """Everything but the arrays, as JSON."""
    return [
        {
            "key": r.key,
            "prompt_length": r.prompt_length,
            "spans": r.spans,
            "finish": r.finish,
            "turns": r.turns,
            "calls": r.calls,
            "stale_kv": r.stale_kv,
            "answer": r.answer,
        }
        for r in rollouts
    ]


def write_buffer(path: Path, rollouts: Iterable[Rollout], targets: Held) -> dict[str, Any]:
    """Write the rollouts' arrays and the raw bytes of all `targets`, synced to disk; returns the file's entry
    in a manifest. Raises `OSError`.
    """
    arrays = dict(_arrays(rollouts))
    sizes = targets.sizes
    raw = {f"{key}.targets": ("U8", (nbytes,), nbytes) for key, nbytes in sizes.items()}
    small = {name: (NAMES[a.dtype.name], a.shape, a.nbytes) for name, a in arrays.items()}
    digest, written = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in chain(
            [_header(small | raw)],
            (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays.values()),
            chain.from_iterable(map(targets.read, sizes)),
        ):
            digest.update(piece.data)
            written += file.write(piece.data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def _arrays(rollouts: Iterable[Rollout]) -> Iterator[tuple[str, np.ndarray]]:
    for r in rollouts:
        for name in ARRAYS:
            if (value := getattr(r, name)) is not None:
                yield f"{r.key}.{name}", value


def _header(tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> np.ndarray:
    """What a file begins with: the header's length in 8 bytes, and each tensor's dtype, shape and place."""
    described: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        start, end = end, end + nbytes
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)


def load_buffer(path: Path, described: list[dict[str, Any]]) -> tuple[list[Rollout], dict[int, np.ndarray]]:
    """The inverse: rollouts, of which `rollout_fields` described the rest, and uint8 targets by key."""
    try:
        arrays = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    rollouts, targets = [], {}
    for d in described:
        fields = {name: arrays.get(f"{d['key']}.{name}") for name in ARRAYS}
        spans, turns = [tuple(s) for s in d["spans"]], [tuple(t) for t in d["turns"]]
        rollouts.append(Rollout(**{**d, "spans": spans, "turns": turns, **fields}))
        if f"{d['key']}.targets" in arrays:
            targets[d["key"]] = arrays[f"{d['key']}.targets"]
    return rollouts, targets
