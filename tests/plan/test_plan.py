"""`fopd plan`: its memory is the memory model's, its best split is one that can be set and is faster, and
what is wrong with an option or a recipe is said in one line.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Fopd, small_recipe
from make_gpus_page import models_of
from typer.testing import CliRunner

from fopd_cli import cli, outlook
from fopd_cli.errors import UserError
from fopd_cli.plan import hardware, page
from fopd_cli.plan.command import plan
from fopd_cli.plan.forecast import BOX_CORES, Forecast, Setting, forecast, guessed
from fopd_cli.plan.lengths import log_normal
from fopd_cli.plan.prompts import Prompts, of_recipe
from fopd_cli.plan.split import Best, best, estimate
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.placement import TURNS, place

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
QWEN = ROOT / "recipes" / "qwen-7b-from-32b.yaml"


def on(recipe: Recipe, devices: int, kind: str = "h100") -> Setting:
    """A recipe of hub models, from their published configurations."""
    prompts = Prompts(log_normal(256, 512, "test"), 500)
    return Setting(
        hardware.chosen(kind, devices, None, bf16=False), models_of(recipe), guessed(recipe), prompts
    )


@pytest.fixture(scope="module")
def qwen() -> Forecast:
    recipe = load_recipe(QWEN)
    return forecast(recipe, on(recipe, 8))


@pytest.fixture(scope="module")
def looked(qwen: Forecast) -> Best:
    return best(qwen)


def invoke(*args: str | Path) -> str:
    """The command, in this process; its error is raised."""
    found = CliRunner().invoke(cli.app, ["plan", *map(str, args)], catch_exceptions=True)
    if isinstance(found.exception, UserError):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


# ---- figures -----------------------------------------------------------------------------------------------


def test_memory_is_the_memory_models(qwen: Forecast, looked: Best) -> None:
    recipe, setting = qwen.recipe, qwen.setting
    fit = memory.Fit(recipe, setting.models, 80 * 10**9)
    where = place(recipe, 8, BOX_CORES, fit)
    by_model = memory.workers(recipe, where, setting.models, 80 * 10**9)
    rows = page.plain(qwen, looked, None)["memory"]
    assert [(r["process"], r["bytes"]) for r in rows] == [(w.spec.name, w.use.peak) for w in by_model]
    assert [d.nbytes for d in qwen.demands] == [d.nbytes for d in memory.demands(where, by_model)]
    shown = "\n".join(page.text(qwen, looked, None))
    for w in by_model:
        assert f"{w.use.peak / 1e9:.1f}" in shown


def test_time_and_money_add_up(qwen: Forecast) -> None:
    steps = qwen.recipe.learner.steps
    assert qwen.evaluations == 5  # before the first step, at 100, 200, 300, and after the last
    training = qwen.outcome.total(steps)
    assert training == pytest.approx(qwen.outcome.seconds * steps, rel=0.1)
    assert qwen.seconds == pytest.approx(training + 5 * qwen.evaluation)
    assert qwen.price(2.5) == pytest.approx(2.5 * 8 * qwen.seconds / 3600)
    assert qwen.tokens == pytest.approx(steps * 128 * 4096, rel=0.02)


def test_every_figure_that_was_not_measured_says_so(qwen: Forecast, looked: Best) -> None:
    assert page.ARITHMETIC in page.line(qwen)
    lines = list(page.text(qwen, looked, None))
    assert page.ARITHMETIC in lines[0]
    for role in page.ROLES:
        assert any(line.startswith(role) and line.endswith(page.ARITHMETIC) for line in lines)
    assert any("a guess" in line for line in lines)


def test_a_device_that_is_too_small_is_told() -> None:
    recipe = load_recipe(QWEN)
    found = forecast(recipe, on(recipe, 8, "l4"))
    assert not found.fits
    shown = "\n".join(page.text(found, best(found), None))
    assert "does NOT fit" in shown
    assert "none of the splits that were looked at fits" in shown
    assert page.plain(found, best(found), None)["fits"] is False


def test_twice_the_rates_are_half_the_seconds() -> None:
    recipe = load_recipe(QWEN)
    setting = on(recipe, 8)
    rates = setting.hardware.rates
    twice = replace(rates, flops=2 * rates.flops, bandwidth=2 * rates.bandwidth, host=2 * rates.host)
    faster = replace(setting, hardware=replace(setting.hardware, rates=twice, launch=0.0))
    slow, fast = (
        forecast(recipe, replace(s, hardware=replace(s.hardware, launch=0.0))) for s in (setting, faster)
    )
    assert slow.outcome.seconds == pytest.approx(2 * fast.outcome.seconds, rel=0.02)


def test_a_turn_is_shorter_where_it_overlaps() -> None:
    recipe = load_recipe(ROOT / "recipes" / "one-gpu-lora.yaml", ["placement.mode=timeslice"])
    setting = on(recipe, 1)
    apart, together = (
        setting.costs(recipe, replace(setting.placed(recipe), overlaps=overlaps)).turn
        for overlaps in ((), TURNS)
    )
    some = setting.placed(recipe)
    assert 0 < len(some.overlaps) < len(TURNS)
    assert together < setting.costs(recipe, some).turn < apart
    found = forecast(recipe, setting)
    (line,) = (text for text in page.text(found, best(found), None) if "take turns on the devices;" in text)
    assert line.endswith(some.describe_turns())


# ---- the best split ----------------------------------------------------------------------------------------


def test_a_bad_split_is_mended_by_what_the_plan_says_to_set() -> None:
    """A learner with one device and samplers with five."""
    bad = ["placement.sampler=5", "placement.teacher=2", "placement.learner=1", "learner.offload=true"]
    recipe = load_recipe(QWEN, bad)
    as_is = forecast(recipe, on(recipe, 8))
    found = best(as_is)
    assert found.forecast.outcome.seconds < 0.9 * as_is.outcome.seconds
    mended = load_recipe(QWEN, [*bad, *found.settings])
    again = forecast(mended, on(mended, 8))
    assert again.plan == found.forecast.plan
    assert again.fits
    assert again.outcome.seconds == pytest.approx(found.forecast.outcome.seconds, rel=0.05)
    shown = "\n".join(page.text(as_is, found, 2.0))
    for setting in found.settings:
        assert f"--set {setting}" in shown


def test_no_split_that_fits_is_better_by_formula_than_those_that_were_simulated(
    qwen: Forecast, looked: Best
) -> None:
    found, setting = looked, qwen.setting
    least = estimate(
        found.forecast.recipe, found.forecast.plan, setting, setting.costs(qwen.recipe, found.forecast.plan)
    )
    for sampler in range(1, 7):
        for teacher in range(1, 8 - sampler):
            split = f"placement={{mode: partition, sampler: {sampler}, teacher: {teacher}}}"
            recipe = load_recipe(QWEN, [split])
            where = setting.placed(recipe)
            demands = memory.demands(where, memory.workers(recipe, where, setting.models, 80 * 10**9))
            if all(d.nbytes <= 0.9 * 80 * 10**9 for d in demands):
                assert estimate(recipe, where, setting, setting.costs(recipe, where)) > 0.9 * least


def test_without_lag_a_plan_says_what_a_lag_would_bring() -> None:
    recipe = load_recipe(QWEN, ["schedule.max_lag=0"])
    as_is = forecast(recipe, on(recipe, 8))
    found = best(as_is)
    assert found.forecast.recipe.max_lag > 0
    assert found.forecast.outcome.seconds < 0.7 * as_is.outcome.seconds


def test_a_plan_says_what_small_models_kept_at_its_lag(qwen: Forecast, looked: Best) -> None:
    """And where it proposes another lag, what they kept at that."""
    said = (
        "what to expect of it: at lag 4 exact losses without any control kept 98% of their synchronous score"
    )
    assert sum(said in line for line in page.text(qwen, looked, None)) == 1
    recipe = load_recipe(QWEN, ["schedule.max_lag=0"])
    as_is = forecast(recipe, on(recipe, 8))
    found = best(as_is)
    (line,) = (line for line in page.text(as_is, found, None) if "what to expect" in line)
    assert "what to expect of its lag: at lag" in line
    assert str(outlook.outlook(found.forecast.recipe)) in line


def test_a_fixed_lag_is_left_alone() -> None:
    recipe = load_recipe(QWEN, ["schedule.lag=2"])
    found = best(forecast(recipe, on(recipe, 8)))
    assert found.forecast.recipe.max_lag == 2


# ---- options -----------------------------------------------------------------------------------------------


def test_the_command_on_devices_that_are_not_here() -> None:
    shown = invoke(QUICKSTART, "--devices", "4", "--memory", "40", "--device", "a100", "--price", "2")
    assert "4 x A100 80 GB of 40 GB, partition" in shown
    assert "the bottleneck is the" in shown
    assert "expected lag:" in shown
    assert "at 2 an hour and device" in shown
    assert "best split:" in shown


def test_the_command_for_machines() -> None:
    found = json.loads(invoke(QUICKSTART, "--devices", "8", "--json", "--lengths", "20,40"))
    assert found["devices"] == 8
    assert found["measured"] == []
    assert found["tokens"] == pytest.approx(240 * 64 * 20, rel=0.05)
    assert set(found["idle"]) == {"sampler", "teacher", "learner"}
    assert found["lag_max"] <= found["max_lag"] == 2
    assert found["best"]["step_seconds"] <= 1.05 * found["step_seconds"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--device", "tpu"], r"--device: 'tpu' is not known; there are h100, .*rtx5090"),
        (["--devices", "0", "--device", "h100"], "--devices: 0 means this machine's CPU"),
        (["--lengths", "many"], "--lengths: 'many' is neither a file"),
        (["--from", "nowhere"], "nowhere: is not a run directory"),
        (["--set", "learner.step=3"], "learner.step: .*did you mean"),
        (["--set", "student.model=./nowhere"], "student.model: there is no directory './nowhere'"),
        (["--set", "teacher.model=./nowhere"], "teacher.model: there is no directory './nowhere'"),
        (["--devices", "2", "--set", "placement.mode=partition"], "partition needs at least 3"),
        (["--devices", "8", "--set", "placement.sampler=8"], "more than the 8"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(args: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as found:
        invoke(QUICKSTART, *args)
    assert "\n" not in str(found.value)


def test_data_that_is_elsewhere_is_not_fetched() -> None:
    found = of_recipe(load_recipe(QWEN))
    assert found.assumed
    assert found.held_out == 500


def test_prompts_that_are_here_are_read() -> None:
    found = of_recipe(load_recipe(QUICKSTART))
    assert not found.assumed
    assert found.held_out == 256
    assert 5 < found.lengths.mean <= found.lengths.most < 40


@pytest.mark.parametrize(
    ("product", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_devices_by_what_their_driver_calls_them(product: str, key: str | None) -> None:
    assert hardware.recognized(product) == key


def test_a_device_is_known_by_its_driver(tmp_path: Path) -> None:
    assert hardware.product(tmp_path) is None
    folder = tmp_path / "gpus" / "0000:1b:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 17\n")
    assert hardware.product(tmp_path) == "NVIDIA H200"


# ---- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run directory, and what the run said."""
    fopd = Fopd(tmp_path_factory.mktemp("plan"))
    recipe = fopd.recipe(small_recipe(pair, learner={"steps": 6}, schedule={"max_lag": 1}))
    said = fopd("run", recipe, "--run-dir", fopd.folder / "run").err
    return fopd.folder / "run", said


def test_a_run_says_its_plan_before_it_starts(ran: tuple[Path, str]) -> None:
    lines = ran[1].splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("plan: about "))
    assert "for 6 steps" in lines[at]
    assert lines[at].endswith(page.ARITHMETIC)
    assert at < next(i for i, line in enumerate(lines) if "held-out at step 0" in line)


def test_a_plan_by_what_a_run_measured(ran: tuple[Path, str]) -> None:
    run, _ = ran
    recipe: Any = load_recipe(run / "recipe.yaml")
    found, _ = plan(recipe, run=run)
    assert found.costs.measured == {"sampler", "teacher", "learner"}
    assert f"measured in {run}" in page.line(found)
    assert page.ARITHMETIC not in "\n".join(page.text(found, best(found), None)).replace(
        "(by arithmetic)", ""
    )
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    mean = sum(r["response_length"] for r in steps) / len(steps)
    assert found.setting.responses.mean == pytest.approx(mean, rel=0.05)


def test_a_run_on_a_cpu_says_nothing_about_devices(ran: tuple[Path, str]) -> None:
    recipe = ran[0] / "recipe.yaml"
    with pytest.raises(UserError, match="ran on a CPU, and the plan is for H100 SXM"):
        invoke(recipe, "--devices", "4", "--from", ran[0])


def test_between_turns_what_never_changes_crosses_the_bus_once() -> None:
    """A frozen teacher and base only come back from main memory; adapters and their AdamW states go there,
    too, at the same time if the turn overlaps; the sampler's weights are dropped.
    """
    recipe = load_recipe(ROOT / "recipes" / "one-gpu-lora.yaml")
    setting = on(recipe, 1)
    found = forecast(recipe, setting)
    models = found.setting.models
    (judge,) = models.teachers.values()
    assert found.plan.exclusive
    assert len(found.workers) == 3
    assert models.trainable is not None
    frozen = 2 * judge.parameters + 2 * models.student.parameters + 2 * judge.head
    learns = (4 + 8) * models.trainable
    for overlaps, times in (((), 2), (TURNS, 1)):
        turn = (frozen + times * learns) / 3 / found.setting.hardware.rates.host
        costs = setting.costs(recipe, replace(found.plan, overlaps=overlaps))
        assert costs.turn == pytest.approx(turn, rel=1e-6)
