"""Unnamed shared memory, and page-locking it.

The kernel commits a page when it is first touched, so tens of gigabytes cost no time at the start (torch's
own shared storages are committed when made, at a second per gigabyte). Memory that could not be committed
later (SIGBUS for the process that writes) is refused at once.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from fopd_cli.errors import UserError
from fopd_cli.runtime.memory.sizes import SHM, free_shared_memory

PORTABLE = 1  # cudaHostRegister's flag: pinned for all contexts
NO_ERROR = 0
ALREADY = 712  # cudaErrorHostMemoryAlreadyRegistered


def shared_bytes(nbytes: int) -> Tensor:
    """uint8 zeros, shared by processes that inherit them or are sent them; freed with the last such process.

    Raises `UserError` if /dev/shm cannot hold them.
    """
    if not SHM.is_dir() or not hasattr(os, "O_TMPFILE"):
        return torch.zeros(nbytes, dtype=torch.uint8).share_memory_()
    if nbytes > free_shared_memory():
        raise UserError(
            f"shared memory: {nbytes / 1e9:.2f} GB are needed, {SHM} has {free_shared_memory() / 1e9:.2f} GB "
            "free; in Docker add --ipc=host (or --shm-size)"
        )
    fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, nbytes)
        made: Any = torch.UntypedStorage
        storage = made._new_shared_fd_cpu(fd, nbytes)  # keeps a copy of the descriptor
    finally:
        os.close(fd)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def page_lock(memory: Tensor, runtime: Any) -> int:
    """Have CUDA's runtime library lock the memory's pages; returns its error, 0 if there is none. Memory that
    another engine in this process has locked is locked.

    A refusal stays pending in the library until it is read, and would look like a failure of the next kernel
    launch; so it is read here.
    """
    pointer, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes)
    error = int(runtime.cudaHostRegister(pointer, size, ctypes.c_uint(PORTABLE)))
    if error != NO_ERROR:
        runtime.cudaGetLastError()
    return NO_ERROR if error == ALREADY else error


def cuda_runtime() -> Any:
    """The CUDA runtime library that torch has loaded, since each copy of the library has its own pending
    errors.
    """
    torch.cuda.init()
    major = str(torch.version.cuda).split(".")[0]
    return ctypes.CDLL(f"libcudart.so.{major}")
