"""Loaded by vLLM in every process that it starts (entry point `vllm.general_plugins`). Ties its processes to
ours, makes them leave signals to the conductor, and registers our weight transfer. In a vLLM that fopd did
not start, it only registers the transfer, which changes nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def register() -> None:
    """May be called several times in one process."""
    _tie_to_parent()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "fopd" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "fopd", "fopd_cli.engines.vllm.weights", "LiveWeightEngine"
        )


def _tie_to_parent() -> None:
    """Make a tensor-parallel process of vLLM die with the worker that started it, however that one dies."""
    parent = int(os.environ.get("FOPD_ENGINE_PARENT", "0"))
    if sys.platform != "linux" or parent in (0, os.getpid()):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before we were tied to it
    # vLLM's own handlers would end this process at Ctrl-C or SIGTERM
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
