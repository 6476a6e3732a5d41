"""Models are downloaded before any worker starts; a missing one is one line. The network is never used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import TINY, small_recipe
from huggingface_hub import constants

from fopd_cli import launch
from fopd_cli.engines.models.downloads import obtain
from fopd_cli.errors import UserError
from fopd_cli.recipe import load_recipe

NAME = "maker/small"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(cache: Path, *names: str) -> Path:
    """Put files of the tiny student into the cache, in its own layout."""
    snapshot = cache / "models--maker--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = cache / "models--maker--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for name in names:
        shutil.copy(TINY / "student" / name, snapshot / name)
    return snapshot


ALL = tuple(p.name for p in (TINY / "student").iterdir() if p.is_file())


def test_a_directory_is_taken_as_it_is(cache: Path) -> None:
    assert not obtain(str(TINY / "student"), "student.model", pytest.fail)


def test_a_name_that_is_in_the_cache_needs_no_network(cache: Path) -> None:
    put(cache, *ALL)
    assert not obtain(NAME, "student.model", pytest.fail)


def test_a_name_offline_is_one_line_that_says_what_to_do(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        obtain(NAME, "teacher.model", pytest.fail)
    line = str(caught.value)
    assert line.startswith(
        "teacher.model: 'maker/small' is not (all) on this machine and cannot be downloaded"
    )
    assert line.endswith("where there is a network: hf download maker/small; or give a model directory")
    assert "\n" not in line


def test_half_a_download_is_no_model(cache: Path) -> None:
    snapshot = put(cache, *(n for n in ALL if not n.endswith(".safetensors")))
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"student.model: .* is not \(all\) on this machine"):
        obtain(NAME, "student.model", pytest.fail)


@pytest.mark.parametrize("size", [1_500_000, 10**16])
def test_the_size_is_said_before_it_is_downloaded_and_must_have_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The hub is a stand-in: its answer to a dry run, and a cache that is full afterwards."""
    real, said, order = huggingface_hub.snapshot_download, list[str](), list[str]()

    def hub(model: str, **how: Any) -> Any:
        if how.get("local_files_only"):
            return real(model, cache_dir=str(cache), **how)
        if how.get("dry_run"):
            return [SimpleNamespace(filename="model.safetensors", file_size=size, will_download=True)]
        order.append(f"after {len(said)}")
        put(cache, *ALL)
        return None

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    if size > 10**12:
        with pytest.raises(UserError, match=r"takes 10000000.0 GB, .* GB free; .* HF_HOME"):
            obtain(NAME, "student.model", said.append)
        assert order == said == []
        return
    assert obtain(NAME, "student.model", said.append)
    assert said == [f"downloading maker/small: 0.00 GB to {cache}"]
    assert order == ["after 1"]
    assert not obtain(NAME, "student.model", said.append)  # once


def test_a_run_asks_for_weights_before_anything_starts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration and tokenizer are in the cache, the weights are not."""
    put(cache, *(n for n in ALL if not n.endswith(".safetensors")))
    recipe = small_recipe(TINY)
    recipe["student"]["model"] = NAME
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(launch.RunDir, "create", pytest.fail)
    with pytest.raises(UserError, match=r"^student.model: 'maker/small' is not \(all\) on this machine"):
        launch.run(load_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
