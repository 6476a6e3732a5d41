"""Tables and figures of benchmarks/staleness.py: those that are committed are of the committed runs, and they
say what they must of runs whose figures are known.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import staleness
import staleness_names as names
import staleness_pages as pages
import staleness_regions as regions
import staleness_report as report
import staleness_tables as tables
import staleness_text_report as text_report

AGAIN = "run python benchmarks/staleness.py --report, and read what the pages say about their tables"


def test_committed_tables_and_pages_are_what_the_committed_runs_give() -> None:
    for path, text in pages.committed().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: {AGAIN}"


def test_every_table_is_on_one_page() -> None:
    shown = [name for page in pages.PAGES for name in pages.blocks((pages.DOCS / page).read_text("utf-8"))]
    assert sorted(shown) == sorted(pages.texts())


@pytest.mark.parametrize(("figure", "folder"), pages.FIGURES.items())
def test_committed_figures_are_of_the_committed_runs(figure: str, folder: str) -> None:
    runs = pages.TOYS / folder / pages.RUNS
    assert pages.drawn_from(pages.TOYS / figure) == pages.fingerprint(runs), f"{figure}: {AGAIN}"


def test_the_order_of_the_runs_does_not_matter() -> None:
    runs = report.read(pages.TOYS / pages.RUNS)
    assert report.files(runs[::-1]) == report.files(runs)
    assert tables.tables(runs[::-1]) == tables.tables(runs)


def test_a_page_is_filled_between_its_marks() -> None:
    one, two, end = "<!-- rows: one -->", "<!-- rows: two -->", "<!-- end -->"
    page = f"before\n{one}\nold\n{end}\nbetween\n{two}\n{end}\nafter"
    once = pages.fill(page, {"one": "1", "two": "2"})
    assert once == f"before\n{one}\n\n1\n\n{end}\nbetween\n{two}\n\n2\n\n{end}\nafter"
    assert pages.fill(once, {"one": "1", "two": "2"}) == once
    with pytest.raises(KeyError):
        pages.fill(page, {"one": "1"})


@pytest.mark.parametrize(
    ("policy", "loss", "lag", "extra", "name"),
    [
        ("fopd", "pg_cached", "8", (), "f-OPD as published, lambda 1"),
        ("fopd", "pg_cached", "8", ("freshness.anchor=10",), "f-OPD as published, lambda 10"),
        ("fopd, defaults", "pg_cached", "3", (), "lambda 20 (defaults)"),
        ("fopd, defaults", "pg_cached", "4", (), "lambda 20"),
        ("fopd, defaults", "pg_cached", "0..8", (), "lambda 20"),
        ("fopd, defaults", "reverse_kl", "8", (), "defaults"),
        ("fopd, pace 64", "pg_cached", "2", (), "pace 64"),
        ("fopd, pace 64", "pg_cached", "<=4", (), "pace 64 (defaults)"),
        ("fopd, pace 32", "pg_cached", "8", (), "pace 32"),
        ("fopd, pace 128", "pg_cached", "32", ("@clip=3",), "pace 128, with @clip=3 (not built)"),
    ],
)
def test_defaults_are_what_a_user_gets_today(
    policy: str, loss: str, lag: str, extra: tuple[str, ...], name: str
) -> None:
    assert names.full_label(policy, loss, lag, extra) == name


def text_run(policy: str, lag: str, kls: list[float], seed: int = 0, **others: Any) -> dict[str, Any]:
    """A run on real text. Its score is 0, so that by its score it has "collapsed"."""
    return {
        "task": "text",
        "loss": "reverse_kl",
        "policy": policy,
        "lag": lag,
        "seed": seed,
        "extra": [],
        "optimizer": "adamw",
        "collapsed": True,
        "kl": kls[-1],
        "kl_curve": [[10 * i, kl] for i, kl in enumerate(kls)],
        "drift_roll": 0.0016 if lag == "0" else 0.25,
        "lag_mean": 7.1,
        "wall_seconds": 430.0 + seed,
        **others,
    }


def cells(table: str, policy: str) -> list[str]:
    """The figures of a policy's line."""
    (line,) = [line for line in table.splitlines() if f" {policy} |" in line]
    return [cell.strip() for cell in line.split("|")][3:-1]


REAL = [
    text_run("sync", "0", [2.0, 1.0], kl_on_answers=1.0),
    text_run("sync", "0", [2.0, 0.8], seed=1, kl_on_answers=1.2),
    text_run("async", "8", [2.2, 1.1], kl_on_answers=1.1, kl_on_answers_at_first=2.1),
    text_run("lag_weight", "8", [2.0, 0.5], kl_on_answers=48.8),
    text_run("fopd, defaults", "<=4", [2.0, 1.0], kl_on_answers=None),
]


def test_real_text_is_judged_by_its_kl_against_sync_of_the_same_seed() -> None:
    table = text_report.text_markdown(REAL)
    # Mean and standard error of 1.0 and 0.8; the mean of 1.0 and 1.2; both seeds' answers are well.
    assert cells(table, "sync") == [
        *("0", "2", "2.00", "0.900 ± 0.100", "100%", "1.10", "100%", "0.0016", "0/2")
    ]
    # From where seed 0 of sync began, not from its own start: (2.0 - 1.1) / (2.0 - 1.0).
    # On the teacher's answers every untrained student has the same: (2.1 - 1.1) / (2.1 - 1.0).
    assert cells(table, "async") == ["8 (7.1)", "1", "2.20", "1.100", "90%", "1.10", "91%", "0.25", "0/1"]
    # A KL that falls by silence is no gain: on the teacher's answers this run is lost.
    assert cells(table, "lag weights")[4:] == ["-", "48.80", "-", "0.25", "1/1"]
    assert cells(table, "defaults") == ["up to 4 (7.1)", "1", "2.00", "1.000", "100%", "-", "-", "0.25", "-"]
    *_, runs, untrained, floor = table.splitlines()
    assert runs == "5 runs, 430 to 431 s each."
    assert untrained == "The untrained student has 2.10 on the teacher's answers."
    assert floor.startswith("D_roll of synchronous samples, the noise floor: 0.0016 to")


def test_the_real_pair_in_a_line_a_loss() -> None:
    held_back = [
        text_run("fopd, defaults", "<=8", [2.0, 0.9], kl_on_answers=0.99),
        text_run("fopd, defaults", "<=8", [2.0, 0.9], seed=1, kl_on_answers=1.21),
    ]
    collapsed = text_run("async", "<=8", [2.0, 0.5], kl_on_answers=9.0)
    (line,) = [
        line for line in text_report.summary([*REAL, *held_back, collapsed]).splitlines() if "91%" in line
    ]
    assert line == "| reverse KL, full | 90% / 91% | collapsed | - | 100% / 100% (2) |"


@pytest.mark.parametrize(
    ("loss", "kls", "found"),
    [
        ("pg_cached", [1.8, 2.4, 0.5], True),  # what the H100's run did
        ("pg_cached", [1.8, 1.9, 0.5], None),  # within noise of its start: a fall alone acquits nobody
        ("topk", [0.4, 0.6], None),  # its KL is over nine classes, and rises while the student learns
    ],
)
def test_without_the_teachers_answers_only_a_rise_tells(
    loss: str, kls: list[float], found: bool | None
) -> None:
    run = text_run("async", "8", kls, loss=loss)
    assert text_report.collapsed(run, [text_run("sync", "0", [1.8, 0.8], loss=loss)]) is found


@pytest.mark.parametrize("folder", [".", *pages.TEXTS])
def test_every_committed_run_can_be_made_again(folder: str) -> None:
    """By a cell of today, unless it is of an idea that was not built."""
    for r in report.read(pages.TOYS / folder / pages.RUNS):
        cell = staleness.Cell(
            *(r[key] for key in ("task", "loss", "policy", "lag", "seed")), tuple(r["extra"])
        )
        if not any(pair.startswith(names.NOT_BUILT) for pair in cell.extra):
            assert cell.overrides, "a loss or policy that nobody knows any more is a KeyError"
            assert r["key"] == replace(cell, optimizer=r["optimizer"]).key


def test_without_lag_all_policy_gradients_are_the_cached_one() -> None:
    sync = text_run("sync", "0", [2.0, 1.0], loss="pg_cached")
    ratio, kl = (text_run("async", "8", [2.0, 1.1], loss=loss) for loss in ("pg_ratio", "reverse_kl"))
    shares = {row.loss: row.of_gain for row in text_report.text_rows([sync, ratio, kl]) if row.lag == "8"}
    assert shares == {"pg_ratio": pytest.approx(0.9), "reverse_kl": None}


def test_a_loss_whose_own_kl_does_not_fall_has_no_shares() -> None:
    rows = text_report.text_rows(
        [
            text_run("sync", "0", [0.465, 0.463], loss="topk"),
            text_run("async", "8", [0.465, 0.504], loss="topk"),
        ]
    )
    assert [row.of_gain for row in rows] == [None, None]


def test_the_map_hatches_what_its_seeds_do_not_decide(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    places = [
        regions.Place(
            1e-4, 2, 0.4, shares={"async": 0.9, "fopd, defaults": 0.97}
        ),  # one seed: not shown to lose
        regions.Place(1e-4, 4, 0.4, shares={"async": 0.99}, published={1: 0.2, 10: 0.98}),
        regions.Place(
            1e-3, 2, 0.4, shares={"async": 0.0, "fopd, defaults": 1.2}, published={1: 0.1, 10: 0.7}
        ),
        regions.Place(1e-3, 4, 0.4, seeds=5, shares={"async": 0.0, "trust": 0.5}),
    ]
    figure, panel = pyplot.subplots()
    regions.draw_map(panel, places)
    squares = [p for p in panel.patches if p.get_fill()]
    assert [bool(p.get_hatch()) for p in squares] == [True, False, False, False]
    said = [t.get_text() for t in panel.texts]
    assert said[0] == "async 90%\nours 97%"
    assert said[2] == "async 0%\nλ 10: 70%\nours 120%", "with the lambda that was best"
    pyplot.close(figure)
    regions.draw(tmp_path / "map.png", {("short", "pg_cached"): places}, {pages.ROWS: "abc"})
    assert pages.drawn_from(tmp_path / "map.png") == "abc"


def test_a_run_of_text_alone_has_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [text_run("sync", "0", [2.0, 1.0]), text_run("async", "8", [2.0, 1.1], kl_on_answers=9.0)]
    (tmp_path / pages.RUNS).write_text("".join(json.dumps(r | {"key": r["policy"]}) + "\n" for r in runs))
    staleness.publish(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [pages.RUNS, "text.png"]
    assert pages.drawn_from(tmp_path / "text.png") == pages.fingerprint(tmp_path / pages.RUNS)


def test_a_run_of_one_task_alone_has_its_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [r for r in report.read(pages.TOYS / pages.RUNS) if r["task"] == "middle"]
    (tmp_path / pages.RUNS).write_text("".join(json.dumps(r) + "\n" for r in runs))
    staleness.publish(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {pages.RUNS, "table.csv", "table.md", "curves.png"}


@pytest.mark.parametrize(
    ("recorded", "given", "said"),
    [
        (
            ["learner.steps=40"],
            ["--set", "learner.steps=60"],
            "theirs: learner.steps=40; yours: learner.steps=60",
        ),
        ([], ["--steps", "3"], "theirs: none; yours: learner.steps=3 eval.every=3"),
        (["learner.lr=1e-3"], [], "theirs: learner.lr=1e-3; yours: none"),
    ],
)
def test_rows_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[str], given: list[str], said: str
) -> None:
    """A cell's key does not name `--set`, so it would count as run."""
    path = tmp_path / pages.RUNS
    path.write_text(json.dumps({"key": "short/pg_cached/sync/0/0/adamw", "sets": recorded}) + "\n")
    monkeypatch.setattr(sys, "argv", ["staleness.py", "--out", str(tmp_path), *given])
    with pytest.raises(SystemExit) as stopped:
        staleness.main()
    assert said in str(stopped.value)
    assert str(path) in str(stopped.value)
    assert "Give another --out" in str(stopped.value)


def test_the_same_settings_in_another_order_are_the_same() -> None:
    rows = [{"sets": ["a=1", "b=2"]}, {"sets": ("b=2", "a=1")}]
    assert staleness.other_settings(rows, ("b=2", "a=1")) is None
    assert staleness.other_settings([{}], ()) is None, "rows from before settings were recorded"
