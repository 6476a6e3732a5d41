"""The CUDA devices that this command was given, and how one is passed on to a worker.

A batch system hands out devices by name: `CUDA_VISIBLE_DEVICES=4,5`, UUIDs, MIG instances. Everything here
numbers the visible devices from 0, as CUDA does. A worker gets the *entry* of the inherited list, since a
bare number there could be another job's device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any, TypeVar

import torch

from fopd_cli.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
UUIDS = ("GPU-", "MIG-")
T = TypeVar("T")


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
    """Total bytes of a visible device, or of a MIG instance; None if they are not known."""
    return _asked(device, lambda nvml, handle: int(nvml.nvmlDeviceGetMemoryInfo(handle).total))


def _asked(device: int, question: Callable[[Any, Any], T]) -> T | None:
    """NVML's answer about a visible device; this process gets no CUDA context. None if nvidia-ml-py is not
    installed, or does not know the device. `question` gets the library and the device's handle.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except ImportError:
        return None
    except nvml.NVMLError:  # there is no driver
        return None
    try:
        return question(nvml, _handle(nvml, entry(device)))
    except (nvml.NVMLError, StopIteration):
        return None
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, name: str) -> Any:
    """NVML's handle of an entry. Raises `NVMLError` or `StopIteration` if there is no such device."""
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(name)
    devices = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    return next(d for d in devices if nvml.nvmlDeviceGetUUID(d).startswith(name))  # it may be abbreviated
