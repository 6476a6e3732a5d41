"""The memory model against measured bytes: shards and their states, what a block saves, real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import learner_kit as kit
import make_gpus_page as gpus_page
import numpy as np
import pytest
import torch
from conftest import ROOT, SLOW

from fopd_cli.engines.models import hf
from fopd_cli.engines.models.shapes import shapes
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.recipe import load_recipe
from fopd_cli.recipe.schema import Learner, Sampler
from fopd_cli.runtime.memory import model as memory
from fopd_cli.samples import Request, SamplingParams

DENSE = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
    "vocab_size": 4000,
}


def config(kind: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**{**DENSE, "tie_word_embeddings": False, **changes})


# ---- shapes ------------------------------------------------------------------------------------------------


PUBLISHED = {  # parameters in billions, from the models' pages on the hub
    "Qwen/Qwen2.5-Math-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen2.5-Math-7B-Instruct": 7.62,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen2.5-14B-Instruct": 14.8,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": 30.5,
    "Qwen/Qwen2.5-32B-Instruct": 32.8,
    "Qwen/Qwen2.5-Math-72B-Instruct": 72.7,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_models_have_the_parameters_that_their_makers_name(name: str, parameters: float) -> None:
    """Uses the configurations that docs/gpus.md is made from."""
    found = gpus_page.published(name)
    counted = shapes(found)
    assert counted.parameters / 1e9 == pytest.approx(parameters, rel=0.004)
    assert counted.kv == hf.kv_bytes_per_token(found, torch.bfloat16) // 2
    if found.model_type == "qwen3_moe":
        assert counted.active / 1e9 == pytest.approx(3.3, abs=0.1)
    else:
        assert counted.active == counted.parameters


def test_every_published_configuration_is_held_against_its_page() -> None:
    assert set(json.loads(gpus_page.CONFIGURATIONS.read_text())) == set(PUBLISHED)


# ---- shards ------------------------------------------------------------------------------------------------


def held(rank: int, world: int, path: str, compute: str, moments: str) -> dict[str, int]:
    """Bytes of this rank's masters, gradients and states after an optimizer step."""
    cfg = kit.config(compute_dtype=getattr(torch, compute), optimizer_dtype=moments)
    samples = kit.make_samples(Path(path), width=128)
    learner = kit.make_learner(Path(path), cfg, rank, world)
    learner.train(0, samples)

    def local(tensor: Any) -> int:
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes

    parameters = list(learner.student.parameters())
    states = [v for state in learner.optimizer.state.values() for n, v in state.items() if n != "step"]
    return {
        "master weights in fp32": sum(map(local, parameters)),
        "gradients in fp32": sum(local(p.grad) for p in parameters if p.grad is not None),
        "AdamW's states": sum(map(local, states)),
    }


@pytest.mark.parametrize(
    ("world", "compute", "moments"),
    [(2, "bfloat16", "fp32"), pytest.param(2, "bfloat16", "bf16", marks=SLOW)],
)
def test_shards_weigh_what_the_model_says(
    pair: Path, tmp_path: Path, world: int, compute: str, moments: Any
) -> None:
    """FSDP's own tensors on gloo ranks."""
    measured = kit.on_ranks(world, tmp_path, held, str(pair), compute, moments)
    use = memory.learner(
        Learner(optimizer_dtype=moments),
        shapes(hf.load_config(str(pair / "student"), "m")),
        [],
        world=world,
        compute=getattr(torch, compute),
        cuda=False,
        tokens=64,
        longest=64,
    )
    predicted = {part.what: part.nbytes for part in use.always}
    for what, nbytes in measured.items():
        assert predicted[what] == pytest.approx(nbytes, rel=0.02), what


# ---- activations -------------------------------------------------------------------------------------------


class Kept:
    """Bytes of the distinct tensors saved for the backward pass inside this context, without parameters."""

    def __init__(self, model: Any) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)
        self._hooks.__enter__()
        return self

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__(*_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_block_keeps_what_the_model_says(kind: str, dtype: torch.dtype) -> None:
    """The difference between a three-layer and a five-layer model is two blocks."""
    tokens, sizes = 96, []
    for layers in (3, 5):
        made: Any = hf.library().AutoModelForCausalLM.from_config(
            config(kind, num_hidden_layers=layers), dtype=dtype, attn_implementation="sdpa"
        )
        with Kept(made) as kept:
            hidden = made.model(input_ids=torch.arange(tokens)[None], use_cache=False).last_hidden_state
        sizes.append(sum(kept.found.values()))
        del hidden
    measured = (sizes[1] - sizes[0]) / 2 / tokens
    assert memory.kept_by_a_block(shapes(config(kind)), dtype.itemsize) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}])
def test_a_sampler_is_charged_for_one_pass(scaling: dict[str, Any]) -> None:
    """With a rotary embedding that depends on the length, a pass is over whole rows, however long."""
    rows, prompt, new, allowed = 4, 30, 10, 40
    changes = {"rope_parameters": scaling, "max_position_embeddings": 64} if scaling else {}
    small = config("llama", hidden_size=32, num_hidden_layers=1, vocab_size=64, **changes)
    made: Any = hf.library().AutoModelForCausalLM.from_config(small, attn_implementation="sdpa")
    rope.by_sequence(made)
    rules = hf.TokenRules(frozenset(), 0)
    sampler = TransformersSampler(made, rules, torch.device("cpu"), rows, prefill_tokens=allowed)
    passes: list[int] = []
    made.register_forward_pre_hook(lambda _, a, k: passes.append(k["input_ids"].numel()), with_kwargs=True)
    params = SamplingParams(max_new_tokens=new)
    sampler.submit([Request(i, np.arange(1, prompt + 1), i, params) for i in range(rows)])
    for step in range(new):
        if step == new - 1:  # an update: everything is read again
            sampler.load(1, [])
        sampler.step()
    section = Sampler(max_new_tokens=new, concurrency=rows, prefill_tokens=allowed)
    use = memory.sampler(section, shapes(small), dtype=torch.float32, cuda=False, longest=prompt + new)
    (charged,) = (p.nbytes for p in use.phases["forward"] if p.what == "activations")
    a_token = memory.under_way_in_a_block(shapes(small), 4)
    assert charged / a_token == pytest.approx(max(passes), rel=0.03)
    assert (max(passes) > 3 * allowed) == bool(scaling)


# ---- real processes ----------------------------------------------------------------------------------------


def taken(pair: Path, role: str, how: str) -> dict[str, Any]:
    """Peak resident memory of a process that does a step of its role's work: measured, and by the model."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    if role == "crowd":  # its cache grows in many copies: what is freed is given back at once, and not held
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    command = [sys.executable, ROOT / "tests" / "memory_kit.py", pair, role, how]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@SLOW
@pytest.mark.parametrize(
    ("role", "how"),
    [
        ("learner", "plain"),
        ("learner", "checkpointed"),
        ("teacher", "float32"),
        ("teacher", "bfloat16"),
        ("sampler", "float32"),
        ("sampler", "bfloat16"),
    ],
)
def test_a_real_role_takes_what_the_model_says(real_pair: Path, role: str, how: str) -> None:
    """Within 15%."""
    found = taken(real_pair, role, how)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found["parts"]


@SLOW
@pytest.mark.parametrize("how", ["in pieces", "many heads share keys", "never in pieces"])
def test_a_sampler_takes_what_one_pass_computes(tmp_path: Path, how: str) -> None:
    """Its rows hold eight times as many tokens as a pass may have. Within 15%."""
    found = taken(tmp_path, "crowd", how)
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found["parts"]


# ---- shipped recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gpus_page.ON_GPUS)
def test_a_shipped_recipe_for_gpus_leaves_a_tenth_of_every_device(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    models = gpus_page.models_of(recipe)
    plan = gpus_page.plan_of(recipe, models, gpus_page.BOXES.get(name, 8))
    found = memory.workers(recipe, plan, models, gpus_page.DEVICE_BYTES)
    for demand in memory.demands(plan, found):
        assert demand.nbytes <= 0.9 * gpus_page.DEVICE_BYTES, (demand.who, memory.largest(demand.parts))
    for worker in found:
        if worker.use.least:  # vLLM starts, and holds more than a handful of samples
            assert worker.use.peak >= worker.use.least
            assert worker.use.rows > 8
    # The published weights alone can be neither more nor less than this.
    judge = next(w for w in found if w.spec.role == "teacher")
    ranks = 1 if judge.spec.whole else judge.spec.world
    weights = next(p.nbytes for p in judge.use.parts if p.what == "weights")
    assert weights == 2 * models.teachers["teacher"].parameters // ranks


def test_the_page_is_what_the_script_makes() -> None:
    """This does not test the figures (the tests above do), only that none was edited by hand."""
    assert "{" not in (page := gpus_page.PAGE.read_text()), "a value that the script does not know"
    assert "<!-- MEMORY" not in page
    for name in gpus_page.ON_GPUS:
        assert len(re.findall(rf"\| {name}[ ,]", page)) == 3, name


def test_the_page_is_up_to_date() -> None:
    """The forecasts on it run the schedule itself, so that a change of the schedule changes the page."""
    assert gpus_page.PAGE.read_text() == gpus_page.page(), "run scripts/make_gpus_page.py"
