"""`fopd resume` with other settings: what is set takes effect, old values are recorded, and what cannot
change is refused by key.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SLOW, Fopd, check_accounts, lines, metrics, small_recipe, summary

from fopd_cli.recipe import changes, load_recipe
from fopd_cli.recipe.schema import Recipe
from fopd_cli.runtime.journal.checkpoint import CheckpointStore, Rhythm


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run except the lock, which holds the process id, and the workers' logs."""
    files = (p for p in run.rglob("*") if p.is_file() and p.name != "run.lock" and p.parent.name != "logs")
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


def written_by_an_older_version(run: Path, step: int) -> None:
    """Give the keys in a run's recipe, and in its checkpoint's, their old names."""
    at = run / "checkpoints" / f"step-{step:06d}"
    recipe, state = (
        yaml.safe_load((run / "recipe.yaml").read_text()),
        json.loads((at / "state.json").read_text()),
    )
    for dumped in (recipe, state["recipe"]):
        dumped["schedule"]["depth"] = dumped["schedule"].pop("max_lag")
        dumped["freshness"]["replay"] = dumped["freshness"].pop("reexecute")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (at / "state.json").write_text(json.dumps(state))
    manifest = json.loads((at / "MANIFEST.json").read_text())
    text = (at / "state.json").read_bytes()
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (at / "MANIFEST.json").write_text(json.dumps(manifest))


def resolved(run: Path, key: str) -> Any:
    value: Any = yaml.safe_load((run / "recipe.yaml").read_text())
    for part in key.split("."):
        value = value[part]
    return value


def rates(run: Path) -> dict[int, float]:
    return {r["step"]: r["lr"] for r in metrics(run) if r["kind"] == "step"}


@SLOW
def test_what_a_resume_sets_stands_from_then_on(fopd: Fopd, pair: Path) -> None:
    """The next plain resume uses it, and the history says since when, even after keys were renamed."""
    run = fopd.run(small_recipe(pair))
    assert not (run / "recipe-history.jsonl").exists()
    fopd("resume", run, "--set", "learner.steps=6", "--set", "learner.lr=5e-6")
    assert (resolved(run, "learner.steps"), resolved(run, "learner.lr")) == (6, 5e-6)
    assert lines(run / "recipe-history.jsonl") == [
        {"step": 4, "changed": {"learner.steps": [4, 6], "learner.lr": [1e-3, 5e-6]}}
    ]
    assert {step: rate for step, rate in rates(run).items() if step > 3} == {4: 1e-3, 5: 5e-6, 6: 5e-6}
    before = contents(run)
    fopd("resume", run)
    assert summary(run)["steps"] == 6
    assert contents(run)["recipe.yaml"] == before["recipe.yaml"]
    written_by_an_older_version(run, 6)
    fopd("diff", run, run)
    err = fopd("resume", run, "--set", "learner.steps=7").err
    assert err.count("schedule.depth is now called schedule.max_lag") == 1
    assert "freshness.replay is now called freshness.reexecute" in err
    assert "schedule.max_lag: samples in flight" not in err
    assert rates(run)[7] == 5e-6
    assert (resolved(run, "schedule.max_lag"), resolved(run, "freshness.reexecute.share")) == (0, 0.125)
    assert [r["step"] for r in lines(run / "recipe-history.jsonl")] == [4, 6]
    check_accounts(run)


@SLOW
def test_an_older_checkpoint_goes_on_with_the_recipe_of_then(fopd: Fopd, pair: Path) -> None:
    """Later changes are set aside, and so are their metrics; later checkpoints no longer count as the run's
    own.
    """
    run = fopd.run(small_recipe(pair, checkpoint={"every": 1, "keep": 10}))
    whole = metrics(run)
    fopd("resume", run, "--set", "learner.steps=6", "--set", "learner.lr=5e-6")
    done = fopd("resume", run, "--step", "2")
    assert "goes back to what it was at step 2" in done.err
    assert metrics(run) == whole
    assert (resolved(run, "learner.steps"), resolved(run, "learner.lr")) == (4, 1e-3)
    assert lines(run / "recipe-history.jsonl") == []
    assert [r["step"] for r in lines(run / "recipe-history.superseded.jsonl")] == [4]
    assert CheckpointStore(run / "checkpoints").steps() == [1, 2, 3, 4]
    aside = sorted(p.name for p in (run / "checkpoints").glob("*.superseded"))
    assert aside == ["step-000005.superseded", "step-000006.superseded"]
    fopd("resume", run)
    assert summary(run)["steps"] == 4


REFUSED = [
    (["student.model=/nowhere"], "student.model differ"),
    (["seed=1", "task.horizon=3"], "task.horizon, seed differ"),
    (["learner.steps=2"], "learner.steps: 2 is less than the 4 steps that are done"),
    (["learner.lr=-1"], "learner.lr: input should be greater than 0"),
    (["learner.step=5"], "did you mean 'steps'"),
    (["learner.steps=9", "sampler.max_new_tokens=5000"], "more than the context of"),
    (["learner.steps=9", "placement.mode=partition"], "placement.mode"),
]


@SLOW
def test_a_resume_that_is_refused_writes_nothing(fopd: Fopd, pair: Path) -> None:
    run = fopd.run(small_recipe(pair))
    (run / "checkpoints" / "step-000009.tmp").mkdir()
    before = contents(run)
    for overrides, message in REFUSED:
        err = fopd("resume", run, *(a for o in overrides for a in ("--set", o)), code=2).err
        assert message in err, overrides
        assert contents(run) == before, overrides
    assert (
        "no checkpoint of step 3"
        in fopd("resume", run, "--step", "3", "--set", "learner.steps=9", code=2).err
    )
    weights = pair / "student" / "model.safetensors"
    weights.rename(pair / "aside")
    try:  # found by a worker, when all else was sound
        fopd("resume", run, "--set", "learner.steps=9", code=2)
    finally:
        (pair / "aside").rename(weights)
    assert contents(run) == before
    assert (run / "checkpoints" / "step-000009.tmp").is_dir()


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> Path:
    """A run with checkpoints after its fourth and its eighth step."""
    return Fopd(tmp_path_factory.mktemp("eight")).run(
        small_recipe(pair, schedule={"max_lag": 3}, learner={"steps": 8}, checkpoint={"every": 4, "keep": 9})
    )


@SLOW
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.temperature=0.8", "sampler.temperature: samples in flight were made with another value"),
        ("learner.batch_samples=16", "learner.batch_samples"),
        ("schedule.max_lag=0", "schedule.max_lag"),
        ("schedule.max_lag=5", ""),
        ("freshness.drift=topk", "freshness.drift"),
    ],
)
def test_settings_on_which_samples_in_flight_depend(
    fopd: Fopd, eight_steps: Path, override: str, message: str
) -> None:
    """They are sampled again; none is lost, none is too old."""
    again = fopd.folder / "again"
    shutil.copytree(eight_steps, again)
    err = fopd("resume", again, "--step", "4", "--set", override).err
    assert message in err
    assert ("are sampled again" in err) == bool(message)
    check_accounts(again)
    value: Any = yaml.safe_load(override.partition("=")[2])
    batch = value if "batch" in override else 8
    counts = {
        r["step"]: len(r.get("trained", [])) + len(r.get("gated", [])) for r in lines(again / "ledger.jsonl")
    }
    assert [counts[s] for s in range(5, 9)] == [batch] * 4
    lags = [r["lag_max"] for r in metrics(again) if r["kind"] == "step" and r["step"] > 4]
    assert max(lags) <= (value if "schedule" in override else 3)
    assert lines(again / "recipe-history.jsonl")[0]["changed"][override.partition("=")[0]][1] == value


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path)))
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("override", "refused", "again"),
    [
        ("learner.lr=1", False, False),
        ("learner.steps=9", False, False),
        ("teacher.engine=vllm", True, False),  # by default it would hand over something else
        ("teacher.batch_samples=2", False, False),
        ("teacher.buffer_gb=1", False, False),
        ("freshness.policy=async", False, False),
        ("eval.samples=2", False, False),
        ("placement.learner=2", False, False),
        ("schedule.max_lag=1", False, False),
        ("sampler.top_p=0.9", False, True),
        ("sampler.max_new_tokens=9", False, True),
        ("freshness.reexecute.share=0", False, True),
        ("student.lora.rank=4", True, False),
        ("task.horizon=3", True, False),
        ("teacher.k=8", True, False),
        ("teacher.context='{question}'", True, False),
        ("sampler.samples_per_prompt=2", True, False),
        ("task.seed=1", True, False),
        ("teacher.dtype=bf16", True, False),
        ("loss.support=mc", False, True),
    ],
)
def test_what_a_change_means(tmp_path: Path, override: str, refused: bool, again: bool) -> None:
    old, new = recipe(tmp_path), recipe(tmp_path, override)
    assert bool(changes.refused(old, new)) == refused
    assert refused or bool(changes.invalidated(old, new)) == again
    found = changes.changes(changes.flat(old), changes.flat(new))
    if not refused:
        assert override.partition("=")[0] in found
        back = [changes.as_override(key, before) for key, (before, _) in found.items()]
        assert recipe(tmp_path, override, *back) == old


class Clock:
    """Minutes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return 60 * self.now


def test_checkpoints_are_due_by_steps_and_by_minutes() -> None:
    clock = Clock()
    rhythm = Rhythm(every=10, minutes=15, clock=clock)
    due = []
    for step in range(1, 41):  # two minutes each
        clock.now += 2
        if rhythm.due(step):
            due.append(step)
            clock.now += 5  # a save takes time; minutes count from its end
            rhythm.saved()
    assert due == [8, 10, 18, 20, 28, 30, 38, 40]
    assert [Rhythm(0, 0, clock).due(s) for s in (1, 100)] == [False, False]
    slow = Rhythm(0, 15, clock)
    clock.now += 14.9
    assert not slow.due(1)
    clock.now += 0.1
    assert slow.due(2)


@SLOW
def test_the_rhythm_of_checkpoints_changes_nothing_else(fopd: Fopd, pair: Path) -> None:
    """Under a fixed lag, metrics are bitwise the same with a checkpoint after each step (almost no minutes)
    or only at the end.
    """
    often, never = (
        fopd.run(
            {**small_recipe(pair, checkpoint={"every": 0, "minutes": m, "keep": 99}), "schedule": {"lag": 2}},
            name,
        )
        for m, name in ((1e-9, "often"), (0, "never"))
    )
    assert CheckpointStore(often / "checkpoints").steps() == [1, 2, 3, 4]
    assert CheckpointStore(never / "checkpoints").steps() == [4]
    assert metrics(often) == metrics(never)
