"""What people do with existing runs: report, runs, diff, fork. One real run, which all tests read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import browser_kit
import hub_kit
import pytest
import torch
import yaml
from conftest import SLOW, Fopd, check_accounts, lines, metrics, small_recipe, summary
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fopd_cli import launch
from fopd_cli.errors import UserError
from fopd_cli.export import student_of
from fopd_cli.recipe import load_recipe
from fopd_cli.report.reading import read
from fopd_cli.runtime.journal.rundir import RunDir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pair: Path) -> Iterator[Path]:
    """A folder with the run `first`: four steps, evaluated and saved every two."""
    path = tmp_path_factory.mktemp("after")
    command = Fopd(path)
    tracked = {"MLFLOW_TRACKING_URI": (path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    command.environment |= tracked
    recipe = small_recipe(
        pair, eval={"every": 2}, learner={"steps": 4, "clip": 1e-6}, track=["mlflow", "wandb"]
    )
    command.run(recipe, "first")
    yield path
    command.stop_all()


@pytest.fixture
def here(folder: Path) -> Iterator[Fopd]:
    """The command, in the run's folder."""
    command = Fopd(folder)
    yield command
    command.stop_all()


def test_a_table_of_the_runs_that_are_here(here: Fopd, tmp_path: Path) -> None:
    head, row = here("runs", ".").out.splitlines()[:2]
    assert head.split() == ["name", "state", "step", "score", "KL", "hours", "process"]
    assert row.startswith("first  finished  4/4")
    last = summary(here.folder / "first")
    assert f"{last['kl_last']:.4f} ± {last['kl_last_error']:.4f}" in row
    assert "holds no run" in here("runs", tmp_path, code=2).err
    (tmp_path / "new").mkdir()
    shutil.copy(here.folder / "first" / "recipe.yaml", tmp_path / "new")
    assert "holds no run" in here("runs", tmp_path, code=2).err, "a recipe that has not been run"
    assert "no complete checkpoint" in here("resume", tmp_path / "new", code=2).err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["recipe.yaml"]
    assert "is not a directory" in here("runs", "nowhere", code=2).err


def test_trackers_have_the_curves_and_one_that_fails_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow, in a directory, has everything; wandb has no login. TensorBoard was not requested."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = pytest.importorskip("mlflow").MlflowClient((folder / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fopd").experiment_id])
    steps = [r for r in metrics(folder / "first") if r["kind"] == "step"]
    found = client.get_metric_history(run.info.run_id, "train/kl")
    assert [m.value for m in sorted(found, key=lambda m: m.step)] == [r["kl"] for r in steps]
    assert run.data.params["learner.steps"] == "4"
    assert not (folder / "first" / "tensorboard").exists()


def test_the_report_of_a_real_run(here: Fopd) -> None:
    out = here("report", "first").out
    path = here.folder / "first" / "report.html"
    assert str(Path("first") / "report.html") in out
    text = path.read_text()
    assert path.stat().st_size < 3_000_000
    for what in (
        "KL to the teacher",
        "sampler-0: generate",
        "student, step 0",
        "student, step 4",
        "finished",
    ):
        assert what in text
    assert "choose one of them" in here("report", "first", "--watch", "-o", "x.html", code=2).err


def test_a_fork_is_the_run_up_to_a_step_and_its_own_from_there(here: Fopd) -> None:
    """With nothing changed it is bitwise the run itself; `first` is left unchanged."""
    first, fork = here.folder / "first", here.folder / "first-fork-2"
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    here("fork", "first", "--step", "2")
    assert metrics(fork) == metrics(first)
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
    check_accounts(fork)
    assert json.loads((fork / "forked-from.json").read_text()) == {"run": str(first.resolve()), "step": 2}
    assert "same in every key" in here("diff", "first", "first-fork-2").out
    assert (
        "exists and is not empty; continue it (fopd resume"
        in here("fork", "first", "--step", "2", code=2).err
    )


def test_what_a_fork_sets_holds_from_its_step_on(here: Fopd) -> None:
    here("fork", "first", "--step", "2", "--run-dir", "hot", "--set", "learner.lr=5.0e-3")
    run = here.folder / "hot"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learner"]["lr"] == 5e-3
    assert [r["lr"] for r in metrics(run) if r["kind"] == "step"] == [1e-3, 1e-3, 5e-3, 5e-3]
    assert lines(run / "recipe-history.jsonl") == [{"step": 2, "changed": {"learner.lr": [1e-3, 5e-3]}}]
    out = here("diff", "first", "hot").out
    assert re.search(r"^learner\.lr +0\.001 +0\.005$", out, re.MULTILINE)
    kls = [summary(here.folder / name)["kl_last"] for name in ("first", "hot")]
    assert f"{kls[1] - kls[0]:+.4f}" in out


@pytest.mark.parametrize(
    ("step", "overrides", "message"),
    [
        (3, [], "there is no checkpoint of step 3; there are [2, 4]"),
        (None, ["seed=3"], "seed differ"),
        (2, ["learner.nonsense=3"], "unknown key"),
        (2, ["learner.steps=1"], "is less than the 2 steps that are done"),
    ],
)
def test_a_fork_that_is_refused_leaves_nothing(
    folder: Path, step: int, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        launch.fork(folder / "first", folder / "refused", step, overrides)
    assert not (folder / "refused").exists()


def test_chat_shows_how_far_the_teacher_is_from_each_token(here: Fopd, pair: Path) -> None:
    """Against both models in plain transformers."""
    process = here.start("chat", "first", "--temperature", "0", "--max-new-tokens", "6")
    out, err = process.communicate("1+2=\n\n/new\n3*4-1=\n/quit\nnever heard\n", timeout=240)
    assert process.returncode == 0, err
    head, said, name, answer = out.splitlines()[:4]
    assert (name, out.count("student, "), "never" in out) == ("teacher:", 2, False)
    tokenizer = AutoTokenizer.from_pretrained(here.folder / "first" / "student")
    models = [
        AutoModelForCausalLM.from_pretrained(p) for p in (here.folder / "first" / "student", pair / "teacher")
    ]
    asked = tokenizer("1+2=", return_tensors="pt")
    ids, theirs = (m.generate(**asked, max_new_tokens=6, do_sample=False) for m in models)
    length = asked["input_ids"].shape[1]
    with torch.no_grad():
        p, q = (m(ids).logits[0, length - 1 : -1].double().softmax(-1) for m in models)
    kl = (p * (p / q).log()).sum(-1)
    told = re.fullmatch(r"student, (\d+\.\d+) nats per token from the teacher:", head)
    assert told is not None
    assert float(told[1]) == pytest.approx(float(kl.mean()), abs=1e-3)
    shown = re.findall(r"\[(\d+\.\d\d)\]", said)  # bytes that are not a character are grouped
    assert sum(map(float, shown)) == pytest.approx(float(kl.sum()), abs=0.04)
    assert answer.strip() == tokenizer.decode(theirs[0, length:], skip_special_tokens=True).strip()


def test_a_student_at_a_checkpoint_is_evaluated_by_its_step(here: Fopd) -> None:
    found = json.loads(here("eval", "first", "--step", "2").out)
    (record,) = [r for r in metrics(here.folder / "first") if r["kind"] == "eval" and r["step"] == 2]
    assert found["score"] == record["score"]
    assert (
        json.loads((here.folder / "first" / "exports" / "step-000002" / "fopd.json").read_text())["step"] == 2
    )
    with pytest.raises(UserError, match=re.escape("there is no checkpoint of step 3; there are [2, 4]")):
        student_of(RunDir.open(here.folder / "first"), 3)


def test_a_run_may_be_named_where_a_model_is(here: Fopd, pair: Path) -> None:
    path = here.recipe(small_recipe(pair, student={"model": "first"}), "second.yaml")
    assert load_recipe(path).student.model == str(here.folder.resolve() / "first" / "student")


def test_weights_are_exported_in_the_dtype_that_is_asked_for(here: Fopd, tmp_path: Path) -> None:
    first = here.folder / "first"
    for name, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        here("export", "first", tmp_path / name, "--dtype", name)
        found = load_file(tmp_path / name / "model.safetensors")
        trained = load_file(first / "student" / "model.safetensors")
        assert {t.dtype for t in found.values()} == {dtype}
        assert all(torch.equal(found[key], tensor.to(dtype)) for key, tensor in trained.items())
    assert "none of auto, bf16" in here("export", "first", tmp_path / "x", "--dtype", "int3", code=2).err


@SLOW
@browser_kit.needed
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_all_curves_and_complains_of_nothing(here: Fopd, tmp_path: Path, dark: bool) -> None:
    here("report", "first", "first", "-o", tmp_path / "page.html")
    assert browser_kit.drawn(tmp_path / "page.html", tmp_path, dark) >= 12
    assert len(read(here.folder / "first").steps) == 4


def test_an_export_has_a_card_and_goes_to_the_hub(here: Fopd, tmp_path: Path) -> None:
    """A real upload with the real client, to a hub on this machine, which receives what was exported."""
    out, offline = tmp_path / "out", {**here.environment, "HF_HOME": str(tmp_path / "home")}
    here.environment |= {"HF_HOME": offline["HF_HOME"]}
    assert "--license: a model" in here("export", "first", out, "--push", "me/small", code=2).err
    arguments = ("export", "first", out, "--push", "me/small", "--license", "apache-2.0", "--private")
    assert "not logged in to the hub" in here(*arguments, code=2).err
    here.environment |= {"HF_TOKEN": "hf_wrong"}
    assert "HF_HUB_OFFLINE is set" in here(*arguments, code=2).err
    assert not out.exists()
    with hub_kit.serve() as hub:
        here.environment = {k: v for k, v in offline.items() if k != "HF_HUB_OFFLINE"}
        here.environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_wrong",
        }
        assert "log in with `hf auth login`" in here(*arguments, code=2).err
        assert not out.exists()
        here.environment |= {"HF_TOKEN": hub_kit.TOKEN}
        assert f"{hub.address}/me/small" in here(*arguments).out
    assert hub.repos == {"me/small": True}
    exported = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert exported.pop("fopd.json"), "where the run lies is nobody's business"
    assert hub.files == exported
    card = hub.files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert str(here.folder) not in card
    last = metrics(here.folder / "first")[-1]
    assert (
        f"| 4 | {last['score']:.3f} ± {last['score_error']:.3f} | {last['kl']:.3f} ± {last['kl_error']:.3f} |"
        in card
    )
    AutoModelForCausalLM.from_pretrained(out)
