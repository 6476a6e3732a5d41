"""benchmarks/throughput.py: its arithmetic, and a cut of it; never how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import throughput
import throughput_report as report
import throughput_trace as trace
from throughput_trace import Span, Window

WINDOW = Window(10.0, 20.0, 2)


def spans(*rows: tuple[str, float, float, dict[str, Any]]) -> list[Span]:
    return [Span(*row) for row in rows]


FOUND: trace.Timeline = {
    "sampler": spans(
        ("generate", 8.0, 12.0, {}),
        ("load", 11.0, 11.5, {"version": 1}),  # in mid-rollout
        ("load", 14.0, 15.0, {"version": 2}),
        ("generate", 15.0, 18.0, {}),
        ("generate", 18.5, 21.0, {}),
    ),
    "teacher": spans(
        ("score", 9.0, 9.5, {"samples": 6}),  # 2 of them held out
        ("score", 10.0, 10.4, {"samples": 2}),
        ("score", 13.0, 14.0, {"samples": 2}),
        ("score", 14.0, 16.0, {"samples": 2}),
        ("score", 16.0, 19.0, {"samples": 1}),
    ),
    "learner": spans(
        ("train", 9.6, 10.0, {}),
        ("publish", 10.0, 10.2, {"version": 1}),
        ("train", 11.0, 13.2, {}),
        ("train", 17.0, 20.0, {}),
        ("publish", 20.0, 20.1, {"version": 3}),
    ),
    trace.BESIDE: spans(("publish", 12.0, 13.2, {"version": 2})),
}


def test_shares_of_a_stage_add_up_and_inner_work_counts_once() -> None:
    shares = trace.shares(FOUND, WINDOW)
    assert shares["sampler"] == pytest.approx({"generate": 0.60, "load": 0.15, "idle": 0.25})
    assert shares["teacher"] == pytest.approx({"score": 0.64, "idle": 0.36})
    assert shares["learner"] == pytest.approx({"train": 0.52, "publish": 0.02, "idle": 0.46})
    assert trace.window(FOUND, 1, 2) == WINDOW


def test_what_the_sampler_waits_for() -> None:
    """Idle from 12 to 14: version 2 is published at 13.2. Idle from 18 to 18.5: no weights follow."""
    assert trace.sampler_waits(FOUND, WINDOW) == pytest.approx(
        {"weights": 1.2, "handover": 0.8, "other": 0.5}
    )


def test_what_the_learner_waits_for() -> None:
    """Batches of 4. Of the samples scored by 9.5, the first step leaves none; the second needs four more."""
    waits = trace.learner_waits(
        {
            **FOUND,
            "teacher": spans(
                ("score", 9.0, 9.5, {"samples": 6}),
                ("score", 9.5, 10.6, {"samples": 4}),  # enough for the second step, which starts at 11
                ("score", 13.0, 14.0, {"samples": 4}),  # enough for the third
                ("score", 14.0, 16.0, {"samples": 1}),  # but it wants this one
            ),
        },
        WINDOW,
        batch=4,
        held_out=2,
    )
    # 10.2 .. 10.6 samples, .. 11 handover; 13.2 .. 14 samples, .. 16 stragglers, .. 17 handover
    assert waits == pytest.approx({"samples": 1.2, "stragglers": 2.0, "handover": 1.4})
    assert trace.drawn_down(FOUND, WINDOW, 4) == pytest.approx(7 / 4 - 2)


def test_tables_go_to_their_place_in_a_page() -> None:
    one, other = report.begin("one.jsonl"), report.begin("other.jsonl")
    page = f"before\n\n{one}\nold\n{report.END}\n\nbetween\n\n{other}\nold\n{report.END}\n\nafter\n"
    filled = report.filled(page, "other.jsonl", "| new |")
    assert filled == page.replace(f"{other}\nold\n", f"{other}\n\n| new |\n\n")
    assert report.filled(filled, "other.jsonl", "| new |") == filled
    with pytest.raises(SystemExit, match="third"):
        report.filled(filled, "third.jsonl", "| new |")


PAGES = [ROOT / "docs" / "throughput" / name for name in ("results.jsonl", "two-cores.jsonl")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_page_has_what_was_measured(path: Path) -> None:
    page = (ROOT / "docs" / "throughput.md").read_text(encoding="utf-8")
    tables = report.markdown(list(report.read(path).values()))
    assert report.filled(page, path.name, tables) == page, f"throughput.py --report --out {path} --into it"


def row(policy: str, depth: int, seconds: float, number: int = 0) -> dict[str, Any]:
    idle = {"sampler": {"generate": 0.5, "idle": 0.5}, "teacher": {"score": 0.5, "idle": 0.5}}
    return {
        "workload": "balanced",
        "key": f"balanced/max_lag {depth}/{policy}/{number}",
        "kind": "run",
        "round": number,
        "depth": depth,
        "policy": policy,
        "seconds": seconds,
        "steps": 10,
        "used_up": 0.0,
        "conductor": 0.01,
        "shares": {**idle, "learner": {"train": 0.7, "publish": 0.1, "save": 0.05, "idle": 0.15}},
        "sampler_waits": {"weights": 0.1, "handover": 0.01, "other": 0.0},
        "learner_waits": {"samples": 0.1, "stragglers": 0.02, "handover": 0.01},
        "response_tokens": 32.0,
        "lag_mean": 1.0,
        "delay_ms": 0.5,
        "cores": 8,
        "threads": 1,
    }


def stages(number: int, learner: float) -> dict[str, Any]:
    seconds = {"sampler": 0.5, "teacher": 0.7, "learner": learner}
    found = {"workload": "balanced", "key": f"balanced/alone/{number}", "kind": "alone", "round": number}
    return {**found, "seconds": seconds, "bound": max(seconds.values()), "response_tokens": 32.0}


def test_a_table_compares_within_rounds() -> None:
    rows = [stages(0, 0.8), row("async", 2, 1.0), row("fopd", 2, 1.25)]
    rows += [stages(1, 0.6), row("async", 2, 0.7, 1), row("fopd", 2, 0.7, 1)]
    table = report.markdown(rows)
    assert "| 2 | async | 1.21 (1.00 .. 1.43) | 90% (80% .. 100%) | 100% |" in table
    assert "| 2 | fopd | 1.11 (0.80 .. 1.43) | 82% (64% .. 100%) | 100% | 90% (80% .. 100%) |" in table
    assert report.limit(rows[0], 0) == pytest.approx(0.8 / 2.0)
    assert report.limit(rows[0], 1) == pytest.approx(0.8 / 1.0)
    stage, shares = report.split(rows[1], rows[0])
    assert stage == "learner"
    assert shares == pytest.approx({"alone": 0.8, "slower": 0.0, "other": 0.05, "idle": 0.15})
    assert report.split(rows[4], rows[3])[0] == "teacher"


def test_every_cell_is_a_valid_recipe_of_its_own() -> None:
    bench = throughput.Bench(4, 1, {}, Path())
    cells = list(throughput.cells(throughput.TINY_WORKLOADS, 2, quick=False))
    assert len({c.key for c in cells}) == len({(c.workload, c.round, c.depth, c.policy) for c in cells})
    for workload in throughput.TINY_WORKLOADS:
        for policy in {c.policy for c in cells if c.workload is workload and c.policy is not None}:
            recipe = bench._recipe(workload, 1.0, *throughput.POLICIES[policy], "schedule.max_lag=8")
            assert recipe.placement.threads.learner == 1


@pytest.mark.slow
def test_a_cut_of_the_benchmark(tmp_path: Path) -> None:
    """Rows exist and add up, nothing is measured twice."""
    out = tmp_path / "results.jsonl"
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--quick", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = report.read(out)
    runs = [r for r in rows.values() if r["kind"] == "run"]
    alone = [r for r in rows.values() if r["kind"] == "alone"]
    assert [(r["depth"], r["policy"]) for r in runs] == [
        (0, "async"),
        (2, "async"),
        (2, "fopd, max_drift null"),
    ]
    assert alone[0]["bound"] == max(alone[0]["seconds"].values()) > 0
    for r in runs:
        for stage, shares in r["shares"].items():
            assert sum(shares.values()) == pytest.approx(1), stage
            assert all(0 <= share <= 1 for share in shares.values())
        assert r["lag_mean"] <= r["depth"]
        for waits, stage in ((r["sampler_waits"], "sampler"), (r["learner_waits"], "learner")):
            a_step = r["seconds"] * (r["steps"] - r["used_up"]) / r["steps"]
            assert sum(waits.values()) == pytest.approx(r["shares"][stage]["idle"] * a_step)
        _, parts = report.split(r, alone[0])
        assert sum(parts.values()) == pytest.approx(1)
    before = out.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == before
    assert json.loads(before.splitlines()[0])["kind"] == "delay"
    told = subprocess.run([*command, "--report"], capture_output=True, text=True, timeout=60)
    assert done.stdout == again.stdout == told.stdout
    assert "| 2 | fopd, max_drift null |" in told.stdout
