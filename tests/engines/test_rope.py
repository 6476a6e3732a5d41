"""Rotary embeddings that depend on a sequence's length: each sequence gets its own, whatever is next to
it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch

from fopd_cli.engines.models import hf
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing

CPU = torch.device("cpu")
SWITCH = architectures.SWITCH
LENGTHS = (5, SWITCH, SWITCH + 1, 30, 3)


def model(name: str, folder: Path) -> tuple[Any, Any]:
    """A model loaded by fopd, and the same one loaded by transformers."""
    config = architectures.ARCHITECTURES[name]()
    architectures.make(config, hf._auto(config)).save_pretrained(folder)
    return hf.load_model(str(folder), "m", torch.float32), hf._auto(config).from_pretrained(folder).eval()


def frequencies(name: str, length: int) -> torch.Tensor:
    """From the papers' formulas, not transformers' code."""
    base = 10000.0 ** (torch.arange(0, 8, 2) / 8)
    if name == "phi3 longrope":
        factors = [2.0, 4.0, 6.0, 9.0] if length > SWITCH else [1.0, 1.1, 1.2, 1.3]
        return 1 / (torch.tensor(factors) * base)
    grown = 10000.0 * ((4.0 * max(length, SWITCH) / SWITCH) - 3.0) ** (8 / 6)
    return 1 / grown ** (torch.arange(0, 8, 2) / 8)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_cosines_are_by_formula_for_each_sequence_of_a_batch(name: str, tmp_path: Path) -> None:
    lm, _ = model(name, tmp_path)
    scaling = math.sqrt(1 + math.log(96 / SWITCH) / math.log(SWITCH)) if "longrope" in name else 1.0
    positions = torch.zeros(len(LENGTHS), 30, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        positions[row] = torch.arange(30).clamp(max=length - 1)
    for _ in range(2):  # the second time with whatever the first one left behind
        cos, sin = lm.model.rotary_emb(torch.zeros(1, 1, 32), positions)
        for row, length in enumerate(LENGTHS):
            angle = torch.arange(length)[:, None] * frequencies(name, length)
            torch.testing.assert_close(cos[row, :length, :4], angle.cos() * scaling, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(sin[row, :length, :4], angle.sin() * scaling, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_neighbours_do_not_change_a_sequence(packed: bool, tmp_path: Path) -> None:
    lm, plain = model("phi3 longrope", tmp_path)
    rng = np.random.Generator(np.random.PCG64(0))
    sequences = [rng.integers(3, 58, size=n).astype(np.int32) for n in LENGTHS]
    if packed:
        enable_packing(lm)
    batch = TokenBatch.of(sequences, packed, CPU, shared=False)
    hidden = batch.hidden(lm)
    for places, sequence in zip(batch.places, sequences, strict=True):
        alone = plain.model(input_ids=torch.from_numpy(sequence).long()[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[places], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_where_vllm_samples_all_have_the_factors_of_the_runs_longest_sample(tmp_path: Path) -> None:
    lm, plain = model("phi3 longrope", tmp_path)
    ids = torch.arange(3, 8)[None]
    short = plain(ids).logits
    rope.by_sequence(lm, SWITCH)
    torch.testing.assert_close(lm(ids).logits, short, rtol=1e-4, atol=1e-5)
    rope.by_sequence(lm, SWITCH + 1)
    assert not torch.allclose(lm(ids).logits, short, atol=1e-2)
    long = plain(torch.cat([ids, torch.arange(8, 30)[None]], -1)).logits[:, :5]
    torch.testing.assert_close(lm(ids).logits, long, rtol=1e-4, atol=1e-5)
    rope.by_sequence(lm)
    torch.testing.assert_close(lm(ids).logits, short, rtol=1e-4, atol=1e-5)


def test_a_piece_of_a_sequence_is_refused(tmp_path: Path) -> None:
    """Positions that start midway do not say how long their sequence is."""
    lm, _ = model("phi3 longrope", tmp_path)
    for positions in ([[4, 5, 6]], [[0, 1, 2, 3, 2, 3]]):
        with pytest.raises(ValueError, match="a piece of it"):
            lm.model.rotary_emb(torch.zeros(1, 1, 32), torch.tensor(positions))


def test_a_beginning_that_is_shared_is_refused(tmp_path: Path) -> None:
    """It would have the lengths of all sequences that start with it."""
    lm, _ = model("phi3 longrope", tmp_path)
    enable_packing(lm)
    sequences = [np.concatenate([np.arange(3, 30), np.array(own)]) for own in ([30, 31], [40])]
    with pytest.raises(ValueError, match="a piece of it"):
        TokenBatch.of(sequences, True, CPU).hidden(lm)


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    lm, _ = model("llama yarn", tmp_path)
    assert rope.switch(lm.config) is None
    assert rope.factors_of(lm.config, 10) == rope.factors_of(lm.config, 90)
    assert "forward" not in vars(lm.model.rotary_emb)
