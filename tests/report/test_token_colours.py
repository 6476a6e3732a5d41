"""Where the student differs from the teacher, token by token: recorded at evaluations, shown in reports."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, lines, small_recipe
from inprocess_kit import conducted
from transformers import AutoModelForCausalLM, AutoTokenizer

from fopd_cli.recipe import load_recipe
from fopd_cli.report import texts
from fopd_cli.report.page import SHADES, page
from fopd_cli.report.reading import read
from fopd_cli.runtime.journal import records
from fopd_cli.samples import Rollout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    recipe = small_recipe(TINY, learner={"steps": 2}, sampler={"max_new_tokens": 20})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return conducted(load_recipe(folder / "recipe.yaml"), folder)


def test_the_kl_at_each_token_is_that_of_two_plain_forward_passes(run: Path) -> None:
    """At step 0 the student is the model that the run began with."""
    first = [s for s in lines(run / "samples.jsonl") if s["kind"] == "eval" and s["step"] == 0]
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    models = [AutoModelForCausalLM.from_pretrained(TINY / who).float() for who in ("student", "teacher")]
    assert len(first) == 2
    for sample in first:
        pieces = sample["pieces"]
        written = "".join(text for text, _ in pieces)
        assert written.removesuffix("<eos>") == sample["response"]  # where it ended counts, too
        asked, said = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample["prompt"], written)
        )
        with torch.no_grad():
            p, q = (m(torch.tensor([asked + said])).logits[0].log_softmax(-1) for m in models)
        kl = (p.exp() * (p - q)).sum(-1)[len(asked) - 1 : -1]
        assert [value for _, value in pieces] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-4)
        assert sample["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_the_teachers_likeliest_tokens_where_it_names_them(tmp_path: Path) -> None:
    """A teacher of top-k log-probs does; the numbers are those of a plain forward pass."""
    recipe = small_recipe(TINY, learner={"steps": 1}, loss={"support": "topk"}, teacher={"k": 8})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = conducted(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    sample = next(s for s in lines(run / "samples.jsonl") if s["kind"] == "eval")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    ids = tokenizer(sample["prompt"] + sample["pieces"][0][0], add_special_tokens=False)["input_ids"]
    teacher = AutoModelForCausalLM.from_pretrained(TINY / "teacher").float()
    with torch.no_grad():
        found = teacher(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(3)
    named = [tokenizer.decode([i]) for i in found.indices.tolist()]
    _, _, likeliest = sample["pieces"][1]
    assert [n for n, _ in likeliest] == named
    assert [p for _, p in likeliest] == pytest.approx(found.values.tolist(), abs=2e-3)
    assert f"the teacher: &quot;{html.escape(named[0])}&quot; {likeliest[0][1]:.0%}" in page([read(run)])


def test_only_samples_grow_by_it(run: Path) -> None:
    assert "pieces" not in (run / "metrics.jsonl").read_text()
    assert all(("pieces" in s) == (s["kind"] == "eval") for s in lines(run / "samples.jsonl"))


def test_the_page_colours_each_token_and_says_what_the_colours_mean(run: Path) -> None:
    text = page([read(run)])
    last = texts.answers(read(run))[0][1][-1]
    assert last.who == "student, step 2"
    assert f"KL {last.kl:.3f}" in text
    for piece, kl, _ in last.pieces:
        assert kl is not None
        shade = sum(kl >= limit for limit in SHADES)
        assert f'<span class="n{shade}" title="{kl:.2g} nats">{html.escape(piece)}</span>' in text
    assert len(re.findall(r'<i class="n\d"></i>', text)) == len(SHADES) + 1


def test_what_a_tool_wrote_has_no_colour_and_a_long_answer_only_its_beginning(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    ids = tokenizer("7+5=2" * 200, add_special_tokens=False)["input_ids"]
    mask = np.ones(len(ids), dtype=bool)
    mask[2:4] = False
    rollout = Rollout(0, np.array([1, *ids]), 1, mask, np.zeros(len(ids)), [(0, 0, len(ids))], "length")
    kls = np.arange(1, mask.sum() + 1, dtype=np.float32)
    found = records.pieces(tokenizer, rollout, kls)
    assert [kl for _, kl in found[:5]] == [1, 2, None, None, 3]
    assert len(found) == records.MOST_PIECES
    sample = {"step": 1, "response": "7+5=2" * 200, "pieces": found, "kl": math.pi}
    answer = texts._answer(sample)
    assert answer.rest == f"\n[… {1000 - records.MOST_PIECES} more characters]"
