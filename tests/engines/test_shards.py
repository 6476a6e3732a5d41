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

from fopd_cli.engines.building import TeacherOrder
from fopd_cli.engines.learner import lora
from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf, shards
from fopd_cli.engines.models.checkpoint_format import converts
from fopd_cli.engines.transformers import build
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.recipe.schema import Teacher

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


def learner_alone(path: str, direct: bool, **changes: Any) -> Any:
    """In fp32, and so without FSDP."""
    lm, unread = shards.empty(path, "m", torch.float32) or (None, None)
    if not direct:
        lm, unread = hf.load_model(path, "m", torch.float32), None
    return FsdpLearner(lm, [], kit.config(vocab=8192, **changes), kit.CPU, 0, 1, unread).student


def sampler_alone(path: str, direct: bool) -> Any:
    lm, unread = shards.empty(path, "m", torch.bfloat16) or (None, None)
    if not direct:
        lm, unread = hf.load_model(path, "m", torch.bfloat16), None
    return TransformersSampler(lm, hf.TokenRules(frozenset(), 0), kit.CPU, 2, unread=unread).model


def test_one_rank_that_reads_by_itself_has_the_same_model(model: Path) -> None:
    """The same bits under the same names, and a tied weight is one parameter, which learns once."""
    makers = {
        "learner": lambda direct: learner_alone(str(model), direct),
        "checkpointed": lambda direct: learner_alone(str(model), direct, activation_checkpointing=True),
        "teacher": lambda direct: teacher_of(str(model), 1, direct),
        "sampler": lambda direct: sampler_alone(str(model), direct),
    }
    for name, make in makers.items():
        found, whole = make(True), make(False)
        assert parts_of(found).keys() == parts_of(whole).keys(), name
        for part, tensor in parts_of(whole).items():
            assert torch.equal(parts_of(found)[part], tensor), (name, part)
        assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in whole.parameters()]


def sharded_alone(rank: int, world: int, path: str) -> list[str]:
    """Names of what differs between the two ways under FSDP."""
    differ = []
    makers = {"learner": learner_of, "adapted": adapted_of}
    makers["offloaded"] = lambda *a: learner_of(*a, offload=True)
    for name, make in makers.items():
        found, whole = (parts_of(make(path, world, in_shards)) for in_shards in (True, False))
        differ += [f"{name} {n}" for n in found.keys() ^ whole.keys()]
        differ += [f"{name} {n}" for n in whole if not torch.equal(found[n], whole[n])]
    return differ


def test_the_only_rank_under_fsdp_has_the_same_model(model: Path, tmp_path: Path) -> None:
    assert kit.on_ranks(1, tmp_path, sharded_alone, str(model)) == []


def test_main_memory_never_holds_a_model_that_is_read_onto_a_device(model: Path) -> None:
    """Onto the meta device, which takes no memory: what is seen is what reading takes of main memory."""
    lm, unread = shards.empty(str(model), "m", torch.float32) or pytest.fail("it would be loaded whole")
    _, peak = peak_of(lambda: unread.place(lm, lm, torch.device("meta")))
    assert {t.device.type for t in parts_of(lm).values()} == {"meta"}
    assert peak < 0.1 * sum(4 * t.numel() for t in lm.parameters())


def test_weights_are_read_onto_accelerators_and_into_shards() -> None:
    assert shards.direct(torch.device("cuda", 0), 1)
    assert shards.direct(kit.CPU, 2)
    assert not shards.direct(kit.CPU, 1)


def test_engines_are_built_that_way(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, but on a CPU: the model was never loaded whole."""
    path = str(pair / "student")
    plain = on_weights(path, torch.bfloat16, kit.CPU, 2).model
    monkeypatch.setattr(shards, "direct", lambda *_: True)
    monkeypatch.setattr(hf, "load_model", lambda *_: pytest.fail("loaded whole"))
    found = parts_of(on_weights(path, torch.bfloat16, kit.CPU, 2).model)
    assert found.keys() == parts_of(plain).keys()
    assert [n for n, tensor in parts_of(plain).items() if not torch.equal(tensor, found[n])] == []
    order = TeacherOrder(Teacher(model=path), torch.float32, kit.CPU, world=1, context=64, vocab=64)
    assert all(t.device.type == "cpu" for t in parts_of(build.teacher(order).model).values())


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
