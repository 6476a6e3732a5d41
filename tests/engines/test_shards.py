"""Weights read straight into shards: what is read, and how much of it is in a rank's memory."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import learner_kit as kit
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.transformers.teacher import TransformersTeacher

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def anonymous_bytes() -> int:
    """This process's anonymous memory, without pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def peak_of(load: Callable[[], Any]) -> tuple[Any, int]:
    """What `load` returned, and by how many bytes the process grew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, done, seen = anonymous_bytes(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = load()
    finally:
        done.set()
        watcher.join()
    return made, max(*seen, anonymous_bytes()) - before


def parts_of(root: Any) -> dict[str, torch.Tensor]:
    tensors = [*root.named_parameters(), *root.named_buffers()]
    return {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors}


def learner_of(path: str, world: int, in_shards: bool, **changes: Any) -> Any:
    lm, unread = shards.empty(path, "m", torch.float32) or (None, None)
    if not in_shards:
        lm, unread = hf.load_model(path, "m", torch.float32), None
    cfg = kit.config(compute_dtype=torch.bfloat16, vocab=8192, activation_checkpointing=True, **changes)
    return FsdpLearner(lm, [], cfg, kit.CPU, torch.distributed.get_rank(), world, unread).student


def adapted_of(path: str, world: int, in_shards: bool) -> Any:
    """A LoRA student, whose base is frozen in bf16."""
    lm, unread = shards.empty(path, "m", torch.bfloat16) or (None, None)
    if not in_shards:
        lm, unread = hf.load_model(path, "m", torch.float32), None
    lora.add_adapters(lm, 4, 8.0, "all-linear", 7, torch.bfloat16)
    unread = None if unread is None else replace(unread, fresh=lora.initial(7))
    cfg = kit.config(compute_dtype=torch.bfloat16, vocab=8192)
    return FsdpLearner(lm, [], cfg, kit.CPU, torch.distributed.get_rank(), world, unread).student


def teacher_of(path: str, world: int, in_shards: bool) -> Any:
    lm, unread = shards.empty(path, "m", torch.bfloat16) or (None, None)
    if not in_shards:
        lm, unread = hf.load_model(path, "m", torch.bfloat16), None
    return TransformersTeacher(lm, kit.CPU, world, 4096, 8192, 64, unread=unread).model


def rank_loads(rank: int, world: int, path: str) -> tuple[list[str], dict[str, int]]:
    """Names of what differs between the two ways, and the peaks: for a model without weights, for each rank
    reading its own, and for a model loaded whole.
    """
    differ, peaks, fill = [], {}, shards.Unread.fill
    kept, peaks["whole"] = peak_of(lambda: hf.load_model(path, "m", torch.float32))

    def measured(*args: Any) -> None:
        _, peaks[name] = peak_of(lambda: fill(*args))

    shards.Unread.fill = measured  # type: ignore[method-assign]
    makers = {"learner": learner_of, "teacher": teacher_of, "adapted": adapted_of}
    makers["offloaded"] = lambda *a: learner_of(*a, offload=True)
    for name, make in makers.items():
        found, whole = (parts_of(make(path, world, in_shards)) for in_shards in (True, False))
        differ += [f"{name} {n}" for n in found.keys() ^ whole.keys()]
        differ += [f"{name} {n}" for n in found if not torch.equal(found[n], whole[n])]
        del found, whole
    _, peaks["empty"] = peak_of(lambda: shards.empty(path, "m", torch.float32))
    del kept  # until now: what is freed is taken again unseen
    return differ, peaks


def test_each_rank_reads_its_own_part(model: Path, tmp_path: Path) -> None:
    """The same bits as a model loaded whole, including buffers, in half the memory."""
    differ, peaks = kit.on_ranks(2, tmp_path, rank_loads, str(model))
    assert differ == []
    size = sum(4 * t.numel() for t in hf.load_model(str(model), "m", torch.float32).parameters())
    assert peaks["whole"] > 0.9 * size  # else nothing was measured
    assert peaks["empty"] < 0.25 * size
    assert peaks["learner"] < 0.75 * size
    assert peaks["offloaded"] < 0.75 * size
    assert peaks["teacher"] < 0.75 * size / 2  # in bf16, as the files
    assert peaks["adapted"] < 0.75 * size / 2


def test_what_transformers_has_to_put_together_is_loaded_whole(tmp_path: Path) -> None:
    """A mixture's file has its experts one by one; the model has them in one tensor."""
    config = Qwen3MoeConfig(**{**SIZES, "vocab_size": 64}, num_experts=4, moe_intermediate_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert shards.empty(str(tmp_path), "m", torch.float32) is None
