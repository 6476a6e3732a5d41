"""`fopd report`: one file, and what stands in it."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fopd_cli.errors import UserError
from fopd_cli.report import texts, timeline, watch
from fopd_cli.report.charts import MOST_POINTS, charts
from fopd_cli.report.page import page, write
from fopd_cli.report.reading import read
from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal.trace import Trace


def step_record(step: int, **values: Any) -> dict[str, Any]:
    timing = {
        "wall_seconds": 60.0 * step,
        "busy": {"sampler": 0.5, "learner": 0.25},
        "buffer_bytes": 2_000_000_000,
    }
    timing["memory_bytes"] = {"sampler-0": 10**9, "sampler-1": 10**9, "learner-0": 3 * 10**9}
    return {
        "kind": "step",
        "step": step,
        "score": 0.5,
        "kl": 0.1,
        "tokens": 600,
        "freshness": 1.0,
        "timing": timing,
        **values,
    }


def make_run(folder: Path, steps: int = 4, planned: int = 4, **recipe: Any) -> Path:
    """A run directory as a run writes it: of records alone, for what is only about reading them."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps({"learner": {"steps": planned}, **recipe}))
    records = [step_record(s, score=s / 10) for s in range(1, steps + 1)]
    evaluations = [
        {
            "kind": "eval",
            "step": s,
            "score": 0.25 * s,
            "score_error": 0.05,
            "kl": 1.0 / (1 + s),
            "kl_error": 0.01,
            "timing": {"wall_seconds": 60.0 * s},
        }
        for s in (0, steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, *evaluations]))
    return folder


def test_a_curve_has_its_errors_its_steps_and_its_minutes(tmp_path: Path) -> None:
    found = {c["title"]: c for c in charts([read(make_run(tmp_path / "a"))])}
    held_out, training = found["Score"]["series"]
    assert (held_out["x"], held_out["t"]) == ([0, 4], [0, 4])
    assert (held_out["y"], held_out["e"]) == ([0, 1], [0.05, 0.05])
    assert training["y"] == [0.1, 0.2, 0.3, 0.4]
    assert found["Speed"]["series"][0]["y"] == [10, 10, 10]  # 600 tokens a minute
    memory = {s["label"]: s["y"][0] for s in found["Memory"]["series"]}
    assert memory == {"sampler": 2, "learner": 3, "teacher targets": 2}
    assert "Entropy" not in found  # nothing to show


def test_a_long_run_is_thinned_to_means_of_neighbours(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=4 * MOST_POINTS)
    kl = next(
        s
        for c in charts([read(run)])
        if c["title"] == "Score"
        for s in c["series"]
        if s["label"] == "training"
    )
    assert len(kl["y"]) == MOST_POINTS
    assert kl["x"][0] == 2.5
    assert kl["y"][0] == pytest.approx(0.25)


def test_what_a_model_wrote_cannot_act_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a</script><b>", system="</pre><script>x")
    hostile = "</script></pre><img src=x onerror=alert(1)><!--"
    sample = {
        "kind": "eval",
        "step": 0,
        "sample": "eval/e0/p0/s0/a0",
        "prompt": hostile,
        "response": hostile,
        "score": 1.0,
    }
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "warnings.jsonl").write_text(json.dumps({"step": 3, "text": hostile}) + "\n")
    text = page([read(run)])
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 4
    assert text.count("&lt;img src=x") == 3


def test_the_page_asks_nothing_of_any_network(tmp_path: Path) -> None:
    text = page([read(make_run(tmp_path / "a")), read(make_run(tmp_path / "b"))])
    assert not re.search(r"""(?:\s(?:src|href|action)\s*=|@import|url\()""", text)
    assert "default-src 'none'" in text


def test_early_halfway_now_and_the_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    samples = [
        {
            "kind": "eval",
            "step": s,
            "sample": f"eval/e0/p{p}/s0/a0",
            "prompt": f"q{p}",
            "response": f"r{p} at {s}",
            "score": s / 8,
        }
        for s in (0, 2, 4, 6, 8)
        for p in (0, 1)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    row = {"prompt_index": 1, "sample": 0, "response": "as the teacher says", "score": 1.0, "finish": "stop"}
    (run / "teacher.jsonl").write_text('{"fopd_eval": "x"}\n' + json.dumps(row) + "\n")
    (first, plain), (second, taught) = texts.answers(read(run))
    assert (first, second) == ("q0", "q1")
    assert [(a.who, a.text) for a in plain] == [(f"student, step {s}", f"r0 at {s}") for s in (0, 4, 8)]
    assert [a.text for a in taught] == ["r1 at 0", "r1 at 4", "r1 at 8", "as the teacher says"]
    assert texts.teacher_score(read(run)) == 1.0


def test_runs_are_compared_by_what_their_recipes_do_not_share(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", freshness={"policy": "fopd", "xi": 0.05}, seed=0)
    b = make_run(tmp_path / "b", freshness={"policy": "sync", "xi": 0.05}, seed=0, planned=8)
    assert texts.differences([read(a), read(b)]) == [
        ("learner.steps", ["4", "8"]),
        ("freshness.policy", ["fopd", "sync"]),
    ]
    shown = next(c for c in charts([read(a), read(b)]) if c["title"] == "Freshness")
    assert [(s["label"], s["colour"]) for s in shown["series"]] == [("a", 0), ("b", 1)]


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4, "sco')
    found = read(run)
    assert (found.step, found.state) == (3, "stopped")
    assert any("stopped after step 3 of 4; go on with: fopd resume" in line for line in texts.advice(found))


def test_idle_shares_and_pauses_between_two_lives_of_a_run(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for start in (1000.0, 1010.0, 9000.0):  # the last one after the night
        trace.add("sampler-0", Span("generate", start, start + 5))
        trace.add("learner-0", Span("train", start + 5, start + 10))
        trace.add("learner-0-publisher", Span("publish", start + 8, start + 9))  # no worker of its own
    found = timeline.pieces(tmp_path / "trace.json")
    assert max(p.end for p in found) == pytest.approx(30)
    assert timeline.idle(found) == pytest.approx({"sampler-0": 0.5, "learner-0": 0.5})
    whole, close = timeline.drawings(found)
    assert 'class="k-train"' in whole[1]
    assert "sampler-0: generate, 5000 ms" in close[1]


def test_a_file_that_is_no_report_is_not_written_over(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "a"), tmp_path / "out.html"
    write([run], out)
    assert write([run], out) == out.stat().st_size  # a report is
    out.write_text("precious")
    with pytest.raises(UserError, match="exists and is not a fopd report"):
        write([run], out)
    assert out.read_text() == "precious"
    with pytest.raises(UserError, match="is not a run directory"):
        write([tmp_path], tmp_path / "other.html")


def test_watching_tells_news_and_hears_only_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    with watch.server([run], 0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_address[1]}"

        def get(path: str, **headers: str) -> str:
            with urllib.request.urlopen(
                urllib.request.Request(address + path, headers=headers), timeout=20
            ) as answer:
                return str(answer.read().decode())

        assert "3 of 4" in get("/")
        before = get("/news")
        assert get("/news") == before
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step_record(4)) + "\n")
        assert get("/news") != before
        assert "4 of 4" in get("/")
        for path, headers in (("/", {"Host": "evil.example:80"}), ("/../recipe.yaml", {})):
            with pytest.raises(urllib.error.HTTPError):
                get(path, **headers)
        http.shutdown()
    with pytest.raises(UserError, match="is not a run directory"):
        watch.server([tmp_path], 0)
