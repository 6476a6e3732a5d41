"""Shared memory: committed as it is written, refused if it would not fit, page-locked without a trace."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from conftest import TINY, small_recipe

from fopd_cli.errors import UserError
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.crew import roles
from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory import shared
from fopd_cli.runtime.memory.arena import Arena
from fopd_cli.runtime.memory.weights import WeightChannel
from fopd_cli.runtime.weights.transport import Shared

MB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm")


def written(memory: torch.Tensor) -> int:
    """Bytes of it that the kernel has committed."""
    fd, _ = memory.untyped_storage()._share_fd_cpu_()
    return 512 * Path(f"/proc/self/fd/{fd}").stat().st_blocks


@LINUX
def test_memory_is_committed_as_it_is_used() -> None:
    arena = Arena(256 * MB)
    channel = WeightChannel.create([("w", (32 * MB,), torch.float32)])
    assert written(arena.memory) == written(channel.memory) == 0
    arena.memory[MB : 3 * MB] = 1
    channel.write(1, iter([("w", torch.ones(32 * MB))]))
    assert written(arena.memory) == 2 * MB
    assert written(channel.memory) == 128 * MB  # one slot of two


def _write(memory: torch.Tensor) -> None:
    memory[7] = 9


def test_another_process_shares_it() -> None:
    memory = shared.shared_bytes(4096)
    process = mp.get_context("spawn").Process(target=_write, args=(memory,))
    process.start()
    process.join()
    assert memory.tolist() == [9 if i == 7 else 0 for i in range(4096)]


@LINUX
def test_what_dev_shm_cannot_hold_is_refused_at_once() -> None:
    with pytest.raises(
        UserError, match=r"shared memory: 1000000.00 GB are needed, /dev/shm has .*--ipc=host"
    ):
        _ = Arena(10**15).memory


RUNTIME = """
#include <stddef.h>
static int pending, refuse;
int registered, kernels;
void refuse_with(int error) { refuse = error; }
int cudaHostRegister(void *p, size_t n, unsigned flags) {
  if (!refuse && p && n && flags == 1) { registered++; return 0; }
  return pending = refuse;
}
int cudaGetLastError(void) { int error = pending; pending = 0; return error; }
int launch(void) { kernels++; return cudaGetLastError(); }  /* as torch checks a launch */
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stand-in for CUDA's runtime library, in which an error also persists until it is read."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "runtime.c").write_text(RUNTIME)
    library = folder / "libcudart.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "runtime.c"], check=True)
    return ctypes.CDLL(str(library))


def test_a_refusal_to_page_lock_is_not_left_for_the_next_kernel(runtime: Any) -> None:
    memory = shared.shared_bytes(4096)
    runtime.refuse_with(2)
    assert shared.page_lock(memory, runtime) == 2
    assert runtime.launch() == 0
    runtime.refuse_with(0)
    assert shared.page_lock(memory, runtime) == 0
    assert runtime.launch() == 0
    assert ctypes.c_int.in_dll(runtime, "registered").value == 1
    runtime.refuse_with(shared.ALREADY)
    assert shared.page_lock(memory, runtime) == 0
    assert runtime.launch() == 0
    runtime.refuse_with(0)


def test_slots_that_cannot_be_locked_are_slower_and_the_log_says_so(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fopd_cli.runtime.memory.weights.cuda_runtime", lambda: runtime)
    channel = WeightChannel.create([("w", (8,), torch.float32)])
    runtime.refuse_with(2)
    channel.page_lock()
    assert "could not be page-locked (CUDA error 2)" in capfd.readouterr().err
    assert runtime.launch() == 0
    channel.write(0, iter([("w", torch.arange(8.0))]))
    ((_, found),) = channel.read(0)
    assert found.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("section", "devices", "locks"),
    [
        ({"engine": "transformers"}, (0,), 1),
        ({"engine": "vllm"}, (0,), 1),
        ({"engine": "vllm", "vllm": {"tensor_parallel": 2}}, (0, 1), 0),
        ({"engine": "vllm"}, (), 0),
    ],
    ids=["transformers", "vllm", "vllm's own processes", "on the CPU"],
)
def test_a_sampler_locks_the_slots_where_its_own_process_copies(
    runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    section: dict[str, Any],
    devices: tuple[int, ...],
    locks: int,
) -> None:
    monkeypatch.setattr("fopd_cli.runtime.memory.weights.cuda_runtime", lambda: runtime)
    monkeypatch.setattr(roles, "build_sampler", lambda *_: None)  # no engine finds a device here
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(TINY, sampler=section)))
    weights = Shared(WeightChannel.create([("w", (8,), torch.float32)]))
    runtime.refuse_with(0)
    registered = ctypes.c_int.in_dll(runtime, "registered")
    before = registered.value
    setup: Any = SimpleNamespace(recipe=load_recipe(tmp_path / "recipe.yaml"), weights=weights)
    roles.Sampling(WorkerSpec("sampler", 0, 1, devices, 1), setup)
    assert registered.value - before == locks
