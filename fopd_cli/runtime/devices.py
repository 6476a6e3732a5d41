"""The CUDA devices that this command was given, and how one is passed on to a worker.

A batch system hands out devices by name: `CUDA_VISIBLE_DEVICES=4,5`, UUIDs, MIG instances. Everything here
numbers the visible devices from 0, as CUDA does. A worker gets the *entry* of the inherited list, since a
bare number there could be another job's device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import combinations

import torch

from fopd_cli.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
UUIDS = ("GPU-", "MIG-")


def listed() -> tuple[str, ...] | None:
    """The entries of the inherited list that CUDA reads, up to the first invalid one; None: there is no list.
    Raises `UserError` if a device is listed twice.
    """
    value = os.environ.get(VISIBLE)
    if value is None:
        return None
    texts = [text.strip() for text in value.split(",")]
    kind = next((prefix for prefix in UUIDS if texts[0].startswith(prefix)), None)
    found: list[str] = []
    for text in texts:
        entry = _ordinal(text) if kind is None else text if text.startswith(kind) else None
        if entry is None:
            break
        found.append(entry)
    for one, other in combinations(found, 2):
        # A UUID may be abbreviated.
        if one == other or (kind == "GPU-" and (one.startswith(other) or other.startswith(one))):
            raise UserError(
                f"{VISIBLE}: {value!r} names device {one} twice, and CUDA then shows none at all; "
                "name each once"
            )
    return tuple(found)


def _ordinal(text: str) -> str | None:
    """The number that a text begins with, as CUDA reads it."""
    number = re.match(r"\+?(\d+)", text)
    return None if number is None else str(int(number[1]))


def count() -> int:
    """Visible devices, counted without making a context in this process."""
    names, visible = listed(), torch.cuda.device_count()
    if names is None or not visible:
        return visible
    if names[0].startswith(
        "MIG-"
    ):  # CUDA shows a process only one instance, but each worker can have its own
        return len(names)
    return min(visible, len(names))


def unusable() -> tuple[str, ...]:
    """Entries of the list that CUDA has no device for."""
    return (listed() or ())[count() :]


def entry(device: int) -> str:
    """The name of a visible device, for the `CUDA_VISIBLE_DEVICES` of a worker."""
    names = listed()
    return str(device) if names is None else names[device]


def memory(device: int) -> int | None:
    """Total bytes of a visible device, from nvidia-smi so that this process gets no CUDA context; None if it
    does not say.
    """
    name = entry(device)
    if name.startswith("MIG-"):
        return _instance_memory(name)
    for line in _nvidia_smi("--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"):
        index, uuid, megabytes = (part.strip() for part in [*line.split(","), "", ""][:3])
        if (index == name or (name in uuid and uuid.startswith(name))) and megabytes.isdigit():
            return int(megabytes) << 20
    return None


def _instance_memory(name: str) -> int | None:
    """Total bytes of a MIG instance by its UUID, from its profile, as in `MIG 3g.40gb`."""
    for line in _nvidia_smi("-L"):
        profile = re.search(r"MIG \S*?(\d+)gb", line)
        if profile and f"(UUID: {name}" in line:
            return int(profile[1]) << 30
    return None


def _nvidia_smi(*arguments: str) -> list[str]:
    """Its output lines; none if it is missing or fails."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()
