"""Where the student differs from the teacher, token by token: recorded at evaluations, shown in reports."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import browser_kit
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, lines, small_recipe
from inprocess_kit import conducted
from transformers import AutoModelForCausalLM, AutoTokenizer

from fopd_cli.engines.learner.likeliest import likeliest
from fopd_cli.recipe import load_recipe
from fopd_cli.report import texts
from fopd_cli.report.page import SHADES, page
from fopd_cli.report.reading import read
from fopd_cli.runtime.journal import records
from fopd_cli.samples import MOST_PIECES, Rollout, TeacherTargets


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
        written = "".join(piece[0] for piece in pieces)
        assert written.removesuffix("<eos>") == sample["response"]  # where it ended counts, too
        asked, said = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sample["prompt"], written)
        )
        with torch.no_grad():
            p, q = (m(torch.tensor([asked + said])).logits[0].log_softmax(-1) for m in models)
        kl = (p.exp() * (p - q)).sum(-1)[len(asked) - 1 : -1]
        assert [piece[1] for piece in pieces] == pytest.approx(kl.tolist(), rel=1e-2, abs=1e-4)
        assert sample["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)


@pytest.mark.parametrize("support", ["full", "topk"])
def test_what_the_teacher_would_rather_have_written(tmp_path: Path, support: str) -> None:
    """From hidden states, and from recorded top-k log-probs: the figures are those of a plain forward
    pass.
    """
    teacher = {"k": 8} if support == "topk" else {}
    recipe = small_recipe(TINY, learner={"steps": 1}, loss={"support": support}, teacher=teacher)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = conducted(load_recipe(tmp_path / "recipe.yaml"), tmp_path)
    samples = [s for s in lines(run / "samples.jsonl") if s["kind"] == "eval"]
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    plain = AutoModelForCausalLM.from_pretrained(TINY / "teacher").float()
    for sample in samples:
        written = [piece[0] for piece in sample["pieces"]]
        ids = tokenizer(sample["prompt"] + "".join(written), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            every = plain(torch.tensor([ids])).logits[0].softmax(-1).topk(3)
        for at, (_, _, told) in enumerate(sample["pieces"], len(ids) - len(written) - 1):
            assert [n for n, _ in told] == [tokenizer.decode([i]) for i in every.indices[at].tolist()]
            assert [p for _, p in told] == pytest.approx(every.values[at].tolist(), abs=2e-3)
    name, probability = samples[-1]["pieces"][1][2][0]
    assert f"the teacher: &quot;{html.escape(name)}&quot; {probability:.0%}" in page([read(run)])
    assert {(s["step"], s["sample"]) for s in samples} == {
        (step, f"eval/e0/p{prompt}/s0/a0") for step in (0, 1) for prompt in (0, 1)
    }


def test_a_teacher_that_gives_one_log_prob_names_nothing() -> None:
    targets = TeacherTargets("sampled", logprobs=torch.zeros(3))
    assert likeliest(targets, []) is None


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
        assert re.search(
            rf'<span class="n{shade}" title="{kl:.2g} nats[^"]*">{re.escape(html.escape(piece))}</span>', text
        )
    assert len(re.findall(r'<i class="n\d"></i>', text)) == len(SHADES) + 1


@browser_kit.needed
def test_a_tap_on_a_token_tells_its_number(run: Path, tmp_path: Path) -> None:
    tap = "<script>document.querySelector('.answers [title]').click()</script></body>"
    (tmp_path / "page.html").write_text(page([read(run)]).replace("</body>", tap))
    text = browser_kit.rendered(tmp_path / "page.html", tmp_path)
    told = re.search(r'<p id="told">(.*?)</p>', text)
    assert told is not None
    assert re.search(r' nats; the teacher: "', html.unescape(told[1]))


def test_what_a_tool_wrote_has_no_colour_and_a_long_answer_only_its_beginning(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    ids = tokenizer("7+5=2" * 200, add_special_tokens=False)["input_ids"]
    mask = np.ones(len(ids), dtype=bool)
    mask[2:4] = False
    rollout = Rollout(0, np.array([1, *ids]), 1, mask, np.zeros(len(ids)), [(0, 0, len(ids))], "length")
    kls = np.arange(1, mask.sum() + 1, dtype=np.float32)
    found = records.pieces(tokenizer, rollout, kls)
    assert [kl for _, kl in found[:5]] == [1, 2, None, None, 3]
    assert len(found) == MOST_PIECES
    sample = {"step": 1, "response": "7+5=2" * 200, "pieces": found, "kl": math.pi}
    answer = texts._answer(sample)
    assert answer.rest == f"\n[… {1000 - MOST_PIECES} more characters]"
