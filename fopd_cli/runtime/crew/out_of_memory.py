"""What to say of a worker that ran out of memory: which memory, and which keys take less.

An engine's own error does not always say it. vLLM's kernels call PyTorch through a C interface that raises
"API call failed" and prints the cause; so the end of the worker's log is read, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

DEVICE = "CUDA out of memory"
HOST = ("can't allocate memory", "MemoryError", "Cannot allocate memory")
LESS = {
    "learner": "lower learner.micro_tokens or loss.chunk_mb, or set learner.activation_checkpointing: true",
    "teacher": "lower teacher.micro_tokens (engine vllm: teacher.vllm.gpu_memory)",
    "sampler": "lower sampler.concurrency or sampler.max_new_tokens (engine vllm: sampler.vllm.gpu_memory)",
}
TAIL = 1 << 16  # bytes of the log
STARTS = " starts: pid "  # in the first line of each process in a log
VMSTAT = Path("/proc/vmstat")


def explained(role: str, said: str, log: Path) -> str:
    """`said`, the first line of a worker's error, or what it ran out of and what to do about it."""
    cause = next((line for line in (said, *_last_lines(log)) if DEVICE in line), None)
    if cause is not None:
        cause = cause[cause.index(DEVICE) :].split(" Process ")[0].split(" Including ")[0]
    elif any(sign in said for sign in HOST):
        cause = f"out of main memory ({said})"
    return said if cause is None else f"{cause.rstrip('. ')}; {advice(role)}"


def advice(role: str) -> str:
    """What takes less memory."""
    return f"{LESS.get(role, 'make its work smaller')}; fopd doctor adds up what fits"


def kills() -> int:
    """How many processes the kernel has killed for want of main memory since it started."""
    try:
        counts = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("oom_kill", 0))


def _last_lines(log: Path) -> Iterator[str]:
    """The last line first, back to where this process started; none if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return
    for line in reversed(lines):
        if STARTS in line:
            return
        yield line
