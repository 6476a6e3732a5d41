"""Lengths that a plan draws from: their mean and their largest are what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fopd_cli.errors import UserError
from fopd_cli.plan.lengths import RARELY, Lengths, given, log_normal, of_steps


@pytest.mark.parametrize(("mean", "most"), [(800, 4096), (24, 48), (1.5, 3), (100, 100), (50, 100_000)])
def test_a_log_normal_has_the_mean_and_the_largest(mean: float, most: int) -> None:
    found = log_normal(mean, most, "test")
    assert found.mean == pytest.approx(mean, rel=0.01)
    assert 1 <= found.values[0] <= found.most <= most


def test_a_log_normal_is_one() -> None:
    """Against numpy's own, with the spread that puts the largest at the quantile of a thousandth."""
    found = log_normal(1000, 8000, "test")
    logs = np.log(found.values)
    drawn = np.random.default_rng(0).lognormal(logs.mean(), logs.std(), 200_000)
    assert np.quantile(drawn, RARELY) == pytest.approx(8000, rel=0.1)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(found.values, q) == pytest.approx(np.quantile(drawn, q), rel=0.05)


def test_a_few_samples_in_a_row_have_the_mean_of_all() -> None:
    found = log_normal(1000, 8000, "test")
    for first in (0, 17, 1000):
        drawn = [found.nth(i) for i in range(first, first + 64)]
        assert np.mean(drawn) == pytest.approx(found.mean, rel=0.05)


def test_what_lies_before_a_token_is_half_of_even_responses() -> None:
    assert Lengths((100,), "even").context == 50
    assert Lengths((10, 100), "uneven").context == pytest.approx((10 * 5 + 100 * 50) / 110)


def test_a_file_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("30\n10\n20\n9000\n")
    assert given(str(path), 500).values == (10, 20, 30, 500)


def test_a_run_with_quantiles_and_one_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths = [rng.lognormal(5, 0.7, 64).clip(1, 1000).round() for _ in range(20)]
    steps = [
        {
            "response_length": float(v.mean()),
            "length_quantiles": np.quantile(v, np.linspace(0, 1, 21)).tolist(),
        }
        for v in lengths
    ]
    found, every = of_steps(steps, "run"), np.concatenate(lengths)
    assert found is not None
    assert found.mean == pytest.approx(every.mean(), rel=0.01)
    for q in (0.1, 0.5, 0.9, 0.97):
        assert np.quantile(found.values, q) == pytest.approx(np.quantile(every, q), rel=0.1)
    older = of_steps([{"response_length": 12.4}, {"response_length": 20.0}], "older")
    assert older is not None
    assert older.mean == pytest.approx(16, abs=0.5)
    assert of_steps([], "none") is None
    (tmp_path / "recipe.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"kind": "step", **s}) + "\n" for s in steps))
    assert given(str(tmp_path), 10**6).values == found.values


@pytest.mark.parametrize("text", ["800", "800,400", "a,b", "0,10", "10,20,30", "nan,10", "lengths.jsonl"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(UserError, match=r"--lengths: .* neither a file or a run directory nor MEAN,MAX"):
        given(text, 1000)


@pytest.mark.parametrize("content", ["12\nx\n", "12 -3\n", "0\n", ""])
def test_what_is_no_file_of_lengths(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"lengths\.txt"):
        given(str(path), 1000)


def test_a_run_without_a_step(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(UserError, match="holds no lengths"):
        given(str(tmp_path), 1000)
