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
from architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.models.checkpoint_format import converts
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


# Its files have the experts one by one; the model has them in one tensor. More than ten: 10 comes after 2.
EXPERTS = {"num_experts": 12, "moe_intermediate_size": 128, "num_experts_per_tok": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "tied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "untied": lambda: Qwen3Config(**SIZES, tie_word_embeddings=False),
    "mixture": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS),
}


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(MODELS[request.param](), tmp_path_factory.mktemp("model"))


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


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "deepseek_v3",
        "granitemoe",
        "phimoe",
        "jamba",
        "qwen3_next",
        "lfm2_moe",
        "gemma3",
        "gpt_neox",
    ],
)
def test_what_transformers_puts_together_is_put_together_from_its_pieces(name: str, tmp_path: Path) -> None:
    """Experts, of other names in each family, renamed layers, convolutions that are three in the files."""
    path = str(saved(ARCHITECTURES[name](), tmp_path))
    assert converts(path)
    lm, unread = shards.empty(path, "m", torch.float32) or pytest.fail("it would be loaded whole")
    unread.fill(lm, lm, torch.device("cpu"))
    whole = hf.load_model(path, "m", torch.float32).state_dict()
    assert lm.state_dict().keys() == whole.keys()
    assert [n for n, tensor in lm.state_dict().items() if not torch.equal(tensor, whole[n])] == []


def test_what_is_put_together_in_another_way_is_loaded_whole(tmp_path: Path) -> None:
    """A tensor in its files is two in the model."""
    path = str(saved(ARCHITECTURES["hrm_text"](), tmp_path))
    assert shards.empty(path, "m", torch.float32) is None


def test_a_tensor_that_no_file_holds_is_never_what_was_in_memory(model: Path) -> None:
    lm, unread = shards.empty(str(model), "m", torch.float32) or pytest.fail("it would be loaded whole")
    del unread.pieces["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight is in no file"):
        unread.fill(lm, lm, torch.device("cpu"))
