"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

MINIMAL = Path(__file__).parent.parent / "examples" / "minimal.py"


def test_the_minimal_loop_learns_from_samples_of_several_lags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("minimal", MINIMAL)
    assert spec is not None
    assert spec.loader is not None
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    monkeypatch.setattr(minimal, "STEPS", 30)  # of 120, after which the KL is a twentieth
    threads = torch.get_num_threads()
    try:
        minimal.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    kl = [float(value) for value in re.findall(r"KL (\S+)", printed)]
    lag = [float(value) for value in re.findall(r"lag (\S+)", printed)]
    least = [float(value) for value in re.findall(r"freshness (\S+)", printed)]
    assert len(kl) == 4
    assert kl[-1] < 0.6 * kl[0]  # measured: 0.39
    assert lag[0] == 0
    assert least[0] > 0.99  # at the first step nothing has drifted, and nothing lags
    assert min(lag[1:]) > 0
    assert max(least[1:]) < 0.5  # some sample lags at least by one step
