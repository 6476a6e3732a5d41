"""Devices that a plan can name: their peak rates from data sheets, and their memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fopd_cli.errors import UserError
from fopd_cli.runtime import devices as visible
from fopd_cli.runtime.time_model import Device

GB = 10**9
CUDA_LAUNCH = 10e-6  # seconds per layer of a forward pass, whatever it computes; an estimate
CPU_LAUNCH = 300e-6
CPU_BF16 = 3.0  # rate of bf16 instructions to that of fp32: products of 1024 x 576 x 576 on an AMD EPYC
DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True)
class Hardware:
    """What a run is planned on: `count` devices, or this machine's CPU (0)."""

    name: str
    count: int
    rates: Device
    nbytes: int  # of each device
    launch: float  # seconds
    size: int = 2  # bytes per number

    @property
    def cpu(self) -> bool:
        return self.count == 0


def _gpu(name: str, tflops: float, tb_per_s: float, gb: int) -> tuple[Device, int]:
    return Device(name, tflops * 1e12, tb_per_s * 1e12), gb * GB


# Dense bf16 rates from the makers' data sheets.
KNOWN: dict[str, tuple[Device, int]] = {
    "h100": _gpu("H100 SXM", 989, 3.35, 80),
    "h100-pcie": _gpu("H100 PCIe", 756, 2.0, 80),
    "h200": _gpu("H200", 989, 4.8, 141),
    "b200": _gpu("B200", 2250, 8.0, 180),
    "a100": _gpu("A100 80 GB", 312, 2.04, 80),
    "a100-40": _gpu("A100 40 GB", 312, 1.56, 40),
    "a6000": _gpu("RTX A6000", 155, 0.77, 48),
    "a10": _gpu("A10", 125, 0.6, 24),
    "l40s": _gpu("L40S", 362, 0.86, 48),
    "l4": _gpu("L4", 121, 0.3, 24),
    "rtx4090": _gpu("RTX 4090", 165, 1.01, 24),
    "rtx5090": _gpu("RTX 5090", 209, 1.79, 32),
}


def chosen(name: str | None, count: int | None, gigabytes: float | None, bf16: bool) -> Hardware:
    """The devices that the options name; without options, this machine's. A CPU computes in `bf16` or in
    fp32. Raises `UserError`.
    """
    if name is not None and name.lower() not in KNOWN:
        raise UserError(
            f"--device: {name!r} is not known; there are {', '.join(KNOWN)} (for another one take the "
            "nearest and give --memory)"
        )
    if count == 0:
        if name is not None or gigabytes is not None:
            raise UserError("--devices: 0 means this machine's CPU; leave out --device and --memory")
        return cpu(len(os.sched_getaffinity(0)), bf16)
    if name is None and count is None and gigabytes is None:
        return here(bf16)
    rates, nbytes = KNOWN[(name or "h100").lower()]
    return Hardware(
        rates.name,
        1 if count is None else count,
        rates,
        nbytes if gigabytes is None else int(gigabytes * GB),
        CUDA_LAUNCH,
    )


def here(bf16: bool) -> Hardware:
    """This machine's devices, or its CPU, which computes in `bf16` or in fp32."""
    count = visible.count()
    if count == 0:
        return cpu(len(os.sched_getaffinity(0)), bf16)
    said = product(DRIVER) or "unknown device"
    key = recognized(said)
    rates, nbytes = KNOWN[key or "h100"]
    sizes = [visible.memory(d) for d in range(count)]
    known = [size for size in sizes if size is not None]
    name = rates.name if key else f"{said}, taken for an {rates.name}"
    return Hardware(name, count, rates, min(known, default=nbytes), CUDA_LAUNCH)


def peak() -> float | None:
    """Dense bf16 FLOP per second of one of this machine's devices; None if it has none or an unknown one."""
    said = product(DRIVER) if visible.count() else None
    key = recognized(said) if said else None
    return KNOWN[key][0].flops if key else None


def product(driver: Path) -> str | None:
    """The driver's name for this machine's first device (all are assumed to be alike), or None."""
    for path in sorted(driver.glob("gpus/*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model" and value.strip():
                return value.strip()
    return None


def recognized(product: str) -> str | None:
    """The key of a device from its driver's name for it, such as `NVIDIA A100-SXM4-40GB`; None if unknown."""
    words = product.upper().replace("-", " ").split()
    marks = {
        "h100-pcie": {"H100", "PCIE"},
        "h100": {"H100"},
        "h200": {"H200"},
        "b200": {"B200"},
        "a100-40": {"A100", "40GB"},
        "a100": {"A100"},
        "a6000": {"A6000"},
        "a10": {"A10"},
        "l40s": {"L40S"},
        "l4": {"L4"},
        "rtx4090": {"4090"},
        "rtx5090": {"5090"},
    }
    return next((key for key, mark in marks.items() if mark <= set(words)), None)


def cpu(cores: int, bf16: bool) -> Hardware:
    """Roughly what a server's cores do in fp32, or in bf16, for which some have instructions of their own."""
    faster = CPU_BF16 if bf16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1.0
    rates = Device(
        f"{cores} cores",
        flops=cores * 40e9 * faster,
        bandwidth=20e9,
        host=4e9,
        training=0.5,
        judging=0.5,
        reading=0.5,
    )
    return Hardware(rates.name, 0, rates, 0, CPU_LAUNCH, 2 if bf16 else 4)
