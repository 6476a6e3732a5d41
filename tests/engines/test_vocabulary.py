"""A pair whose vocabularies differ: ids that one model lacks are never sampled, and carry no mass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SLOW, Fopd, lines, small_recipe

from fopd_cli.engines.models import hf
from fopd_cli.engines.transformers.build import on_weights
from fopd_cli.samples import Request, SamplingParams

CPU = torch.device("cpu")


def padded(source: Path, folder: Path, rows: int, loud: float) -> Path:
    """A copy with `rows` more rows of vocabulary, which would be likely if allowed."""
    model: Any = hf.load_model(str(source), "m", torch.float32)
    own = hf.vocab_size(model.config)
    model.resize_token_embeddings(own + rows, mean_resizing=False)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[own:] = loud * torch.randn(rows, head.shape[1], generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    hf.load_tokenizer(str(source), "m").save_pretrained(folder)
    return folder


def test_ids_past_the_shared_ones_are_never_sampled(llama_pair: Path, tmp_path: Path) -> None:
    path = str(padded(llama_pair / "student", tmp_path / "m", rows=28, loud=2.0))
    model: Any = hf.load_model(path, "m", torch.float32)
    params = (
        SamplingParams(max_new_tokens=12, keep_topk=-1, draws=3),
        SamplingParams(temperature=0.0, max_new_tokens=12, keep_topk=-1, draws=3),
    )
    for vocab in (288, 260):
        sampler = on_weights(path, torch.float32, CPU, 8, vocab)
        wanted = [Request(i, np.array([5, 6, 7 + i], np.int32), i, params[i == 7]) for i in range(8)]
        sampler.submit(wanted)
        rollouts = []
        while sampler.busy:
            rollouts += sampler.step()
        drawn = np.concatenate([r.response_ids for r in rollouts] + [r.draw_ids.ravel() for r in rollouts])
        assert (drawn.max() >= 260) == (vocab == 288)  # it would draw them
        for r in rollouts:
            with torch.no_grad():
                logits = model(torch.from_numpy(r.token_ids).long()[None]).logits[
                    0, r.prompt_length - 1 : -1, :vocab
                ]
            expected = torch.log_softmax(logits, -1).numpy()
            if r.key != 7:
                np.testing.assert_allclose(r.topk_logprobs, expected, rtol=1e-5, atol=1e-4)
                own = np.take_along_axis(expected, r.response_ids[:, None].astype(int), -1)[:, 0]
                np.testing.assert_allclose(r.logprobs, own, rtol=1e-5, atol=1e-4)
            else:
                assert (r.response_ids == expected.argmax(-1)).all()


@SLOW
@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_a_run_with_a_larger_vocabulary_on_either_side(fopd: Fopd, llama_pair: Path, larger: str) -> None:
    """It trains, its drifts are those of one policy, and `fopd eval` reproduces its scores."""
    other = "teacher" if larger == "student" else "student"
    models = {
        larger: {"model": str(padded(llama_pair / larger, fopd.folder / larger, rows=28, loud=2.0))},
        other: {"model": str(llama_pair / other)},
    }
    run = fopd.run(small_recipe(llama_pair, **models, learner={"steps": 2}, sampler={"dtype": "fp32"}))
    steps = [record for record in lines(run / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 2
    assert steps[0]["drift_roll"] < 1e-6  # the policy that sampled is the learner's
    fopd("eval", run)


def test_prompts_and_ends_that_the_teacher_cannot_read(fopd: Fopd, llama_pair: Path) -> None:
    """A teacher with so few ids that the prompts' characters, and the end token, are past them."""
    model: Any = hf.load_model(str(llama_pair / "teacher"), "m", torch.float32)
    model.resize_token_embeddings(1, mean_resizing=False)
    model.save_pretrained(fopd.folder / "teacher")
    hf.load_tokenizer(str(llama_pair / "teacher"), "m").save_pretrained(fopd.folder / "teacher")
    recipe = fopd.recipe(small_recipe(llama_pair, teacher={"model": str(fopd.folder / "teacher")}))
    out = fopd("doctor", recipe, "--no-sanity", code=2).out
    assert "the models share only the ids below 1: none would ever end" in out
    assert "task: prompt 0 holds token 32" in out
