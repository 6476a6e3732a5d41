"""A model's files: what they lack is named before training, and a trained student is always written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learner_kit as kit
import numpy as np
import pytest
import tiny_models
import torch
from conftest import Fopd, small_recipe
from safetensors.torch import load_file, save_file

from fopd_cli.engines.learner.learner import FsdpLearner
from fopd_cli.engines.models import hf, model_files
from fopd_cli.engines.tokens.token_batch import TokenBatch
from fopd_cli.errors import UserError

Tensors = dict[str, torch.Tensor]


def changed(source: Path, folder: Path, change: Callable[[Tensors], Any], **config: Any) -> str:
    """A copy of a model directory with other tensors, and other values in its configuration."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))
    return str(folder)


def both(model: str) -> tuple[str, str]:
    """The problems found by loading the weights, and by reading the files' headers."""
    with pytest.raises(UserError) as loading:
        hf.load_model(model, "student.model", torch.float32)
    report = hf.load_report(model, hf.load_config(model, "m"), "student.model")
    assert report is not None
    return str(loading.value), "; ".join(what for what, _ in report.errors("student.model:"))


def test_a_whole_model_is_no_finding(pair: Path, llama_pair: Path) -> None:
    for folder in (pair, llama_pair):
        path = str(folder / "student")
        report = hf.load_report(path, hf.load_config(path, "m"), "m")
        assert report is not None
        assert report.errors("m") == report.warnings("m") == []


def test_missing_weights_are_named(llama_pair: Path, tmp_path: Path) -> None:
    gone = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "kqv"]
    model = changed(llama_pair / "student", tmp_path / "m", lambda t: [t.pop(name) for name in gone])
    for message in both(model):
        assert "lacks 6 weights" in message
        assert all(name in message for name in sorted(gone)[:3])
        assert "\n" not in message


def test_an_untied_head_is_never_taken_from_the_embeddings(llama_pair: Path, tmp_path: Path) -> None:
    model = changed(llama_pair / "teacher", tmp_path / "m", lambda t: t.pop("lm_head.weight"))
    for message in both(model):
        assert "lacks 1 weight (lm_head.weight)" in message
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        hf.load_head(model, "teacher.model", torch.float32)


def test_weights_of_another_shape_are_named_with_both(llama_pair: Path, tmp_path: Path) -> None:
    def shorten(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-4].clone()
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()

    model = changed(llama_pair / "teacher", tmp_path / "m", shorten)
    for message in both(model):
        assert "lm_head.weight [256, 128] instead of [260, 128]" in message
        assert "model.norm.weight [127] instead of [128]" in message
    with pytest.raises(UserError, match=r"lm_head\.weight \[256, 128\] instead of \[260, 128\]"):
        hf.load_head(model, "teacher.model", torch.float32)


def test_experts_that_are_not_all_there_are_named(pair: Path, tmp_path: Path) -> None:
    whole = tiny_models.save(tiny_models.tiny_model("glm4_moe"), tmp_path / "whole", pair / "student")
    gone = "model.layers.1.mlp.experts.5.gate_proj.weight"
    for message in both(changed(whole, tmp_path / "m", lambda t: t.pop(gone))):
        assert "lacks" in message
        assert "model.layers.1.mlp.experts" in message


def test_embeddings_that_are_tied_and_differ_are_named(pair: Path, tmp_path: Path) -> None:
    """Tied by configuration, but the file holds a separate head: it is unclear which one is meant."""

    def own_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def copied_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = changed(pair / "student", tmp_path / "differs", own_head)
    for message in both(model):
        assert "lm_head.weight and model.embed_tokens.weight" in message
    with pytest.raises(UserError, match="tie_word_embeddings"):
        hf.load_head(model, "teacher.model", torch.float32)
    as_told = changed(pair / "student", tmp_path / "untied", own_head, tie_word_embeddings=False)
    head = hf.load_head(as_told, "teacher.model", torch.float32).weight
    lm: Any = hf.load_model(as_told, "m", torch.float32)
    torch.testing.assert_close(head, lm.get_output_embeddings().weight.detach())
    assert (head - lm.get_input_embeddings().weight).abs().min() > 0.9
    same = changed(pair / "student", tmp_path / "same", copied_head)
    hf.load_model(same, "m", torch.float32)
    hf.load_head(same, "m", torch.float32)


@pytest.mark.slow
def test_doctor_and_run_name_what_is_wrong_with_the_weights(fopd: Fopd, pair: Path, llama_pair: Path) -> None:
    bad = changed(llama_pair / "teacher", fopd.folder / "bad", lambda t: t.pop("model.norm.weight"))
    odd = changed(
        pair / "student", fopd.folder / "odd", lambda t: t.update({"model.extra.weight": torch.zeros(3)})
    )
    recipe = fopd.recipe(small_recipe(pair, student={"model": odd}, teacher={"model": bad}))
    out = fopd("doctor", recipe, "--no-sanity", code=2).out
    assert f"error: teacher.model: '{bad}' lacks 1 weight (model.norm.weight)" in out
    assert f"warning: student.model: '{odd}' holds 1 weight (model.extra.weight)" in out
    assert "lacks 1 weight (model.norm.weight)" in fopd("run", recipe, code=2).err


def shards(folder: Path) -> None:
    """Split the one file into two and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file(
            {n: tensors[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def held_twice(folder: Path) -> None:
    tensors = load_file(folder / "model-1.safetensors")
    name = "model.norm.weight"
    for file, value in (("model-1.safetensors", 1.0), ("model-2.safetensors", 2.0)):
        tensors = {**load_file(folder / file), name: torch.full((96,), value)}
        save_file(tensors, folder / file, metadata={"format": "pt"})


def halved(folder: Path) -> None:
    whole = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(whole[: len(whole) // 2])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pointer": (
        lambda folder: (folder / "model-1.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0"
        ),
        r"model-1\.safetensors is a pointer of Git LFS",
    ),
    "half a file": (halved, r"model-2\.safetensors is not whole"),
    "no file": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "there is neither a model.safetensors",
    ),
    "a file less": (
        lambda folder: (folder / "model-2.safetensors").unlink(),
        r"index\.json names 1 file \(model-2\.safetensors\) that are not there",
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"metadata": {}}'),
        r"index\.json is no index of weights",
    ),
    "half an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {'),
        r"index\.json is no index of weights",
    ),
    "two values": (held_twice, r"both hold model\.norm\.weight, and differ"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_are_broken_are_named(what: str, pair: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(pair / "student", folder)
    shards(folder)
    config = hf.load_config(str(folder), "m")
    whole = hf.load_report(str(folder), config, "m")
    assert whole is not None
    assert whole.errors("m") == []
    spoil, message = BROKEN[what]
    spoil(folder)
    with pytest.raises(UserError, match=message) as refused:
        hf.load_report(str(folder), config, "student.model")
    assert "\n" not in str(refused.value)


def test_an_adapter_is_no_model(pair: Path, tmp_path: Path) -> None:
    """transformers would silently load the base model that it names."""
    model = changed(pair / "student", tmp_path / "m", lambda t: None)
    (tmp_path / "m" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/other"}')
    with pytest.raises(UserError, match=r"student\.model: .* is a LoRA adapter; merge it"):
        hf.load_config(model, "student.model")


def test_a_checkpoints_own_code_is_not_run(pair: Path, tmp_path: Path) -> None:
    """And the terminal does not ask whether to run it."""
    own = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration.Own"}}
    model = changed(pair / "student", tmp_path / "m", lambda t: None, **own)
    (tmp_path / "m" / "configuration.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=r"student\.model: cannot load a model configuration") as refused:
        hf.load_config(model, "student.model")
    assert "\n" not in str(refused.value)


# ---- saving ------------------------------------------------------------------------------------------------


GREEDY = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [1, 2]}


def test_any_generation_config_is_kept_as_it_stands(pair: Path, tmp_path: Path) -> None:
    source = changed(pair / "student", tmp_path / "m", lambda t: None)
    odd = (
        {"typical_p": 0.5, "do_sample": False},
        {"num_beams": 1, "length_penalty": 0.3},
        {"output_scores": True, "note": "mine"},
    )
    for number, content in enumerate((GREEDY, *odd)):
        (Path(source) / "generation_config.json").write_text(json.dumps(content))
        model: Any = hf.load_model(source, "m", torch.float32)
        out = tmp_path / f"out{number}"
        out.mkdir()
        model_files.write_model(model, source, out)
        assert json.loads((out / "generation_config.json").read_text()) == content
        again = hf.load_model(str(out), "m", torch.float32).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_what_transformers_does_not_save_is_written_without_it(
    pair: Path, llama_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tied and untied; the weights are written in the requested dtype, and load in it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("GenerationConfig is invalid")

    for folder in (pair, llama_pair):
        source, out = str(folder / "student"), tmp_path / folder.name
        out.mkdir()
        model: Any = hf.load_model(source, "m", torch.float32)
        hf.cast(model, torch.bfloat16)
        model.save_pretrained = refuse
        model_files.write_model(model, source, out)
        model_files.write_tokenizer(source, out)
        assert (
            "warning: transformers does not save this model (GenerationConfig is invalid)"
            in capsys.readouterr().err
        )
        assert hf.load_config(str(out), "m").dtype == torch.bfloat16
        assert (out / "generation_config.json").read_bytes() == (
            folder / "student/generation_config.json"
        ).read_bytes()
        again = hf.load_model(str(out), "m", torch.bfloat16).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_run_whose_student_says_odd_things_about_generation_ends_well(fopd: Fopd, pair: Path) -> None:
    source = changed(pair / "student", fopd.folder / "m", lambda t: None)
    (Path(source) / "generation_config.json").write_text(json.dumps(GREEDY))
    run = fopd.run(small_recipe(pair, student={"model": source}, learner={"steps": 2}))
    hf.load_model(str(run / "student"), "m", torch.float32)
    assert json.loads((run / "student" / "generation_config.json").read_text()) == GREEDY
    fopd("eval", run)


# ---- what an architecture keeps in fp32 --------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["glm4_moe", "ernie4_5_moe"])
def test_what_stays_in_fp32_is_published_and_exported_in_it(
    architecture: str, pair: Path, tmp_path: Path
) -> None:
    from fopd_cli.engines.transformers.sampler import TransformersSampler
    from fopd_cli.runtime.memory.weights import WeightChannel

    model = tiny_models.tiny_model(architecture)
    layout = hf.weight_layout(model.config, torch.bfloat16)
    kept = {name for name, _, dtype in layout if dtype == torch.float32}
    assert kept
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(tensor.bfloat16())  # so that a bf16 copy of it is exact
            if name in kept:
                tensor.add_(torch.rand_like(tensor) / 3)
    path = str(tiny_models.save(model, tmp_path / "m", pair / "student"))
    loaded: Any = hf.load_model(path, "m", torch.bfloat16)
    assert layout == hf.weight_layout(hf.load_config(path, "m"), torch.bfloat16)
    assert kept == {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    channel = WeightChannel.create(layout)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channel.write(0, iter((name, exact[name]) for name, _, _ in layout))
    sampler = TransformersSampler(loaded, hf.TokenRules(frozenset({1}), 0), torch.device("cpu"), 1)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    sampler.load(0, channel.read(0))
    assert all(torch.equal(tensor.float(), exact[name]) for name, tensor in loaded.state_dict().items())
    hf.cast(model, torch.bfloat16)
    out = tmp_path / "out"
    out.mkdir()
    model_files.write_model(model, path, out)
    again = hf.load_model(str(out), "m", torch.bfloat16).state_dict()
    assert all(torch.equal(tensor.float(), exact[name]) for name, tensor in again.items())


def hidden_states(rank: int, world: int, path: str, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of a learner that computes in bf16."""
    cfg = kit.config(compute_dtype=torch.bfloat16, packing=False)
    learner = FsdpLearner(hf.load_model(path, "m", torch.float32), [], cfg, kit.CPU, rank, world)
    with torch.no_grad():
        return learner.student.hidden(TokenBatch(ids, np.zeros(1, dtype=np.int64)))


@pytest.mark.parametrize("architecture", ["glm4_moe", "ernie4_5_moe"])
def test_a_learner_in_bf16_computes_as_the_sampler_does(
    architecture: str, pair: Path, tmp_path: Path
) -> None:
    """Bit for bit: a router in another precision would sometimes choose other experts."""
    path = str(tiny_models.save(tiny_models.tiny_model(architecture), tmp_path / "m", pair / "student"))
    ids = torch.randint(2, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sampler = hf.load_model(path, "m", torch.bfloat16)
        expected = hf.backbone(sampler)(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = kit.on_ranks(1, tmp_path, hidden_states, path, ids)
    assert torch.equal(found, expected)
