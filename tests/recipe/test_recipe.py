"""Recipes: every mistake is one line that names the key and the remedy; the shipped ones are sound."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, small_recipe

from fopd_cli.errors import UserError
from fopd_cli.recipe import dump_recipe, explain, load_recipe
from fopd_cli.runtime.placement import place

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path)))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.step=3", "learner.step: unknown key; did you mean 'steps'"),
        ("task.horzon=3", "task.horzon: unknown key; did you mean 'horizon'"),
        ("freshness.refresh.meen=3", "freshness.refresh.meen: unknown key; did you mean 'mean'"),
        ("tutor.model=x", "tutor: unknown key"),
        ("learner.lr=fast", "learner.lr: .* it is 'fast'"),
        ("learner.steps=0", "learner.steps: .* greater than 0"),
        ("schedule.max_lag=-1", "schedule.max_lag"),
        ("freshness.policy=f-opd", "freshness.policy: .*'fopd'"),
        ("loss.kind=kl", "loss.kind"),
        ("student.model=null", "student.model: .* valid string"),
        ("learner", "write key=value"),
        ("student.model.x=1", "student.model is not a section"),
        ("task.name=math", "task.train: is required"),
        (
            "task.name=chta",
            (
                r"task.name: there is no task 'chta'; did you mean 'chat'\? \(a task of your own: "
                r"package.module:Class\)$"
            ),
        ),
        (
            "task.name=gsm8k",
            r"task.name: there is no task 'gsm8k'; there are arithmetic, chat, math, swe, tool \(a",
        ),
    ],
)
def test_mistakes_in_one_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_recipe(recipe, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "anchor", "drift"),
    [
        ([], 0, "sampled"),
        (["loss.support=topk"], 0, "sampled"),
        (["loss.support=sampled"], 20, "topk"),
        (["loss.support=mc"], 20, "topk"),
        (["loss.support=sampled", "sampler.top_p=0.95"], 10, "quadratic"),
        (["loss.support=sampled", "freshness.drift=sampled"], 30, "sampled"),
        (["loss.support=sampled", "freshness.policy=reweight"], 0, "sampled"),
        (["freshness.anchor=1"], 1, "topk"),
        (["freshness.policy=async", "freshness.anchor=1"], 0, "sampled"),
        (["freshness.drift=exact"], 0, "exact"),
    ],
)
def test_anchor_and_drift_follow_the_loss(
    recipe: Path, overrides: list[str], anchor: float, drift: str
) -> None:
    found = load_recipe(recipe, overrides)
    assert (found.anchor, found.drift) == (anchor, drift)


@pytest.mark.parametrize(
    ("overrides", "pace", "ratio"),
    [
        ([], 64, True),
        (["schedule.max_lag=3"], None, False),  # 64/3 is more than 20: nothing to weaken
        (["schedule.lag=4"], 64, True),
        (["schedule.lag=3"], None, False),
        (["freshness.pace=160", "schedule.max_lag=9"], 160, True),
        (["freshness.pace=160", "schedule.max_lag=8"], None, False),
        (["freshness.pace=null"], None, False),
        (["freshness.pace=null", "loss.importance=true"], None, True),
        (["freshness.policy=async"], None, False),
        (["freshness.anchor=0"], None, False),
        (["freshness.drift=quadratic"], None, False),
        (["sampler.top_p=0.9"], None, False),
        (["loss.importance=true"], 64, True),
        (["loss.importance=false"], None, False),
        (["loss.importance=false", "freshness.pace=64"], 64, False),
        (["loss.support=mc"], 64, False),  # which always has it
        (["loss.support=full", "freshness.anchor=20"], None, False),
    ],
)
def test_a_long_lag_weakens_the_anchor_of_a_policy_gradient_and_brings_the_ratio(
    recipe: Path, overrides: list[str], pace: float | None, ratio: bool
) -> None:
    long = ["loss.support=sampled", "schedule.max_lag=16", "freshness.xi=0.01"]
    found = load_recipe(recipe, [*long, *overrides])
    assert (found.pace, found.importance) == (pace, ratio)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["schedule.max_lag=4", "freshness.xi=0.2"],
            r"freshness.xi: .* 1/\(lag \+ 1\) = 0.2 at lag 4; choose xi under 0.2",
        ),
        (["schedule.lag=9", "freshness.xi=0.1", "schedule.max_lag=0"], "at lag 9"),
        (["freshness.policy=sync", "schedule.max_lag=2"], "set schedule.max_lag: 0"),
        (["loss.support=topk", "loss.tail=false"], "set loss.tail: true"),
        (["loss.support=sampled", "loss.kind=forward_kl"], "set loss.kind: reverse_kl"),
        (["loss.support=full", "teacher.targets=topk"], "set teacher.targets: hidden"),
        (["loss.support=topk", "teacher.targets=sampled"], "set teacher.targets: topk"),
        (["freshness.drift=topk", "sampler.top_p=0.9"], "set sampler.top_p: 1"),
        (
            ["teacher.template=teacher", "teacher.engine=http", "teacher.http.url=http://x"],
            "set teacher.template: student",
        ),
        (["loss.max_ratio=2"], "loss.support full has no importance ratio"),
        (["freshness.policy=trust"], "loss.support full has none"),
        (["loss.support=sampled", "loss.max_ratio=2"], "importance: true"),
        (["loss.student_k=4"], "belongs to loss.support topk, not full"),
        (["loss.support=topk", "loss.student_k=64"], "raise teacher.k"),
        (["loss.student_k=4", "teacher.engine=vllm"], "log-probs of its own likeliest tokens only"),
        (["learner.optimizer_dtype=bf16", "learner.betas=[0.9,0.999]"], "would be rounded away"),
        (["loss.support=sampled", "loss.temperature=2"], "loss.temperature: sampled support .* set it to 1"),
        (["loss.support=mc", "loss.temperature=0.5"], "loss.temperature: mc support .* set it to 1"),
        (["loss.support=topk", "loss.temperature=0.5"], "loss.temperature: top-k"),
        (
            ["loss.teacher_temperature=sampler"],
            "belongs to loss.support sampled and mc; full has loss.temperature",
        ),
        (
            ["loss.teacher_temperature=sampler", "loss.support=sampled", "teacher.targets=sampled"],
            "set teacher.targets: hidden",
        ),
        (
            ["loss.teacher_temperature=sampler", "loss.support=sampled", "teacher.engine=http"],
            "not the hidden states that loss.teacher",
        ),
        (
            ["loss.support=full", "teacher.engine=vllm"],
            r"set loss.support: topk \(or auto\), teacher.targets: hidden, or teacher.engine: transformers",
        ),
        (
            ["teacher.engine=http", "teacher.http.url=localhost:8000/v1"],
            "is not a URL; write it like http://",
        ),
        (["teacher.engine=http", "teacher.http.url=file:///etc/passwd"], "is not a URL"),
        (["teacher.engine=http", "teacher.http.url='http://a b/v1'"], "is not a URL"),
    ],
)
def test_contradictions(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, overrides)


def test_a_threshold_that_does_not_weigh_is_no_contradiction(recipe: Path) -> None:
    load_recipe(recipe, ["freshness.policy=async", "schedule.max_lag=9", "freshness.xi=0.5"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "a recipe is a mapping"), ("", "a recipe is a mapping")],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_recipe(tmp_path)


def test_overrides_and_the_resolved_dump(recipe: Path, tmp_path: Path) -> None:
    parsed = load_recipe(
        recipe, ["learner.lr=1e-5", "freshness.refresh.mean=0.3", "placement.threads.sampler=2"]
    )
    assert (parsed.learner.lr, parsed.freshness.refresh.mean, parsed.placement.threads.sampler) == (
        1e-5,
        0.3,
        2,
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(parsed))
    assert load_recipe(again) == parsed


def test_paths_beside_the_recipe_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub" / "student").mkdir(parents=True)
    (tmp_path / "here" / "student").mkdir(parents=True)
    (tmp_path / "here" / "teacher").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "sub" / "r.yaml"
    path.write_text("student: {model: student}\nteacher: {model: teacher}\ntask: {name: arithmetic}\n")
    parsed = load_recipe(path)
    assert parsed.student.model == str(tmp_path / "sub" / "student")
    assert parsed.teachers[0].model == str(tmp_path / "here" / "teacher")
    path.write_text("student: {model: Qwen/Qwen2.5-0.5B}\nteacher: {model: a/b}\ntask: {name: arithmetic}\n")
    assert load_recipe(path).student.model == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {lr: .nan}", "learner.lr: nan is not a finite number"),
        ("learner: {lr: nan}", "learner.lr: .*finite number"),
        ("seed: -1", "seed: .*greater than or equal to 0"),
        ("seed: 9223372036854775808", "seed: whole numbers must be under"),
        ("seed: 0x" + "f" * 6000, "seed: whole numbers must be under"),
        ("seed: 2024-01-01", "seed: .*type date; put it in quotes"),
        ("seed: 2024-13-45", "YAML cannot read"),
        ("a: &a [*a]", "a.0: refers to itself"),
        ("{1: 2}", "the key 1 must be a text"),
        ("learner: {1: 2}", "learner: the key 1 must be a text"),
        ("a: !!set {b}", "a: .* type set"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ('student: {model: "\\ud800"}', "student.model: .* half a character"),
        ("a: [" + "1," * 20_001 + "]", "more than 20,000 values"),
        ("a: " + "x" * 300_000, "300,003 characters long"),
        ("math: 3", "math: unknown key"),
        ("task: {name: [1]}", "task.name: .* valid string"),
        ("task: {name: {}}", "task.name: .* valid string"),
        ("placement: {sampler: 1000000000}", "placement.sampler: .*less than or equal to 1024"),
        (
            "placement: {threads: {learner: 100000000000000000000000000000}}",
            "placement.threads.learner: whole numbers",
        ),
        ("{" + ", ".join(f"k{i}: 1" for i in range(500)) + "}", "and 499 more problems"),
        ("student: {model: " + "x" * 5000 + "}", "is required"),
    ],
)
def test_what_a_recipe_cannot_mean(tmp_path: Path, text: str, message: str) -> None:
    """One short line, which says where."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_recipe(path)
    assert len(str(error.value)) < 1500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_mutated_recipes_end_in_one_short_line(path: Path) -> None:
    """250 mutations of each shipped recipe, with what `fopd run --dry-run` does, in a process of bounded
    memory.
    """
    program = ROOT / "tests" / "recipe_fuzz.py"
    done = subprocess.run(
        [sys.executable, str(program), str(path), "250", "0"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_key_is_explained() -> None:
    keys = list(explain())
    assert len(keys) > 70
    for key, kind, default, meaning in keys:
        assert meaning.strip(), key
        assert kind, key
        assert default, key
    assert ("learner.lr", "float", "1.0e-06", "Peak learning rate.") in keys


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_place(path: Path) -> None:
    recipe = load_recipe(path)
    for devices in (0, 1, 8):
        if recipe.placement.mode != "partition" or devices == 8:
            assert place(recipe, devices, cores=16).describe()


def test_the_named_recipes_are_there() -> None:
    assert {"quickstart", "one-gpu", "qwen-7b-from-32b", "paper-reasoning"} <= {p.stem for p in SHIPPED}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipes_in_the_documentation_are_sound(tmp_path: Path, page: Path) -> None:
    """What readers are shown is valid; what an excerpt leaves out is the quickstart's."""
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
        for section, values in yaml.safe_load(block).items():
            goes_on = isinstance(values, dict) and "name" not in values
            recipe[section] = recipe.get(section, {}) | values if goes_on else values
        path = tmp_path / "shown.yaml"
        path.write_text(yaml.safe_dump(recipe))
        load_recipe(path)


def test_the_readme_shows_a_recipe() -> None:
    assert "```yaml" in (ROOT / "README.md").read_text()
