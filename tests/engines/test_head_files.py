"""A learner needs only the teacher's head: for a model on a hub, no other file is fetched for it.

The hub is this test's own server, which the real client talks to.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fopd_cli.engines.models import hf

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A model in several files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model", max_shard_size="24KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return model


@pytest.fixture
def fetched(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files whose contents were requested."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = tmp_path / "model" / self.path.rpartition("/")[2]
            if not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                asked.append(path.name)
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", address)
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    thread.join()


def test_the_file_with_the_head_is_all_that_is_fetched(model: Any, fetched: list[str]) -> None:
    weight = hf._files_of("somebody/teacher", "teacher.model", ["lm_head.weight"])
    assert weight is not None
    assert torch.equal(weight.tensor("lm_head.weight"), model.lm_head.weight)
    shards = [name for name in fetched if name.endswith(".safetensors")]
    assert len(shards) == 1
