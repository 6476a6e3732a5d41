"""What can be wrong with a server: a context that is too short, or values that are not log-probs. A real
server on loopback.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, small_recipe

from fopd_cli import doctor
from fopd_cli.engines.http.teacher import HttpServer, HttpTeacher
from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError
from fopd_cli.inputs import Inputs, load_inputs
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.placement import place
from fopd_cli.samples import Rollout, TeacherTargets

VOCAB = 260


class Server:
    """The tiny teacher behind the part of the API that we use. `tells`: whether it reports its context;
    `scale` and `shift` corrupt its values.
    """

    def __init__(self) -> None:
        self.model: Any = hf.load_model(str(TINY / "teacher"), "m", torch.float32)
        self.tokenizer = hf.load_tokenizer(str(TINY / "teacher"), "m")
        self.context, self.tells, self.scale, self.shift = 1024, True, 1.0, 0.0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                entry = {"id": "teacher", **({"max_model_len": owner.context} if owner.tells else {})}
                self.answer(200, {"data": [{"id": "other", "max_model_len": 1}, entry]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*owner.complete(body))

            def answer(self, code: int, content: Any) -> None:
                payload = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        if len(ids) + body["max_tokens"] > self.context:
            said = f"This model's maximum context length is {self.context} tokens, the prompt has {len(ids)}"
            return 400, {"error": {"message": said}}
        choice: dict[str, Any] = {"prompt_token_ids": ids}
        if "prompt_logprobs" in body:
            logits = self.model(torch.tensor([ids])).logits[0, :, :VOCAB]
            values = torch.log_softmax(logits, -1) * self.scale + self.shift
            entries: list[Any] = [None]
            for row, token in zip(values, ids[1:], strict=False):
                order = row.argsort(descending=True).tolist()
                kept = {*order[: body["prompt_logprobs"]], token}
                entries.append({str(i): {"logprob": float(row[i]), "rank": order.index(i) + 1} for i in kept})
            choice["prompt_logprobs"] = entries
        return 200, {"choices": [choice]}


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(shared: Server) -> Server:
    shared.context, shared.tells, shared.scale, shared.shift = 1024, True, 1.0, 0.0
    return shared


def teacher(server: Server, model: str = "teacher") -> HttpTeacher:
    return HttpTeacher(HttpServer(server.url, model, None, 4, 30.0, 0), VOCAB)


def load(folder: Path, server: Server, *questions: str) -> Inputs:
    rows = folder / "q.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in questions)
    )
    remote = {"model": "teacher", "engine": "http", "k": 8, "http": {"url": server.url, "retries": 0}}
    recipe = {**small_recipe(TINY, learner={"batch_samples": 1}), "teacher": remote}
    recipe["task"] = {"name": "chat", "train": str(rows), "eval": str(rows), "eval_prompts": 1}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    parsed = load_recipe(folder / "r.yaml")
    return load_inputs(parsed, place(parsed, 0))


def test_prompts_that_a_server_cannot_take_are_dropped_up_front(tmp_path: Path, server: Server) -> None:
    server.context = 64
    inputs = load(
        tmp_path, server, "held out", "x" * 51, "x" * 52, "y" * 200
    )  # 51 + 2 + 10 new ones + 1 are 64
    assert inputs.stream.kept["train"] == [0]
    (note,) = [notice for notice in inputs.stream.notices if "too long" in notice]
    assert "2 of 3 train prompts are too long and left out" in note
    assert "more than the context of 64 of teacher.http.url" in note
    assert [str(f) for f in doctor.findings(inputs, tmp_path) if f.level != "note"] == []


def test_a_server_that_does_not_tell_its_context_is_asked_with_the_longest_sample(
    tmp_path: Path, server: Server
) -> None:
    server.context, server.tells = 64, False
    assert teacher(server).context() is None
    with pytest.raises(UserError) as error:
        list(doctor.findings(load(tmp_path, server, "held out", "x" * 60), tmp_path))
    assert "refuses a sample of 72 tokens as too long" in str(error.value)
    assert re.search(r"the longest sample that there can be is of row 2 of '.*q.jsonl'$", str(error.value))
    assert "max_logprobs" not in str(error.value)
    assert server.url in str(error.value)


def test_the_context_is_that_of_the_model_in_use(server: Server) -> None:
    assert teacher(server).context() == 1024
    assert teacher(server, "other").context() == 1
    assert teacher(server, "nobody").context() is None
    server.http.RequestHandlerClass.do_GET, saved = (
        lambda self: self.answer(500, []),
        server.http.RequestHandlerClass.do_GET,
    )  # type: ignore[attr-defined]
    try:
        assert teacher(server).context() is None
    finally:
        server.http.RequestHandlerClass.do_GET = saved  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("scale", "shift", "k"),
    [
        (1.0, 4.0, 8),
        (1.0, 0.5, 8),
        (-1.0, 0.0, 8),
        (1.0, -8.0, 8),
        (1.0, float("nan"), 8),
        (-1.0, 0.0, 0),
        (0.0, 0.0, 2),
    ],
)
def test_values_that_are_no_logprobs_are_refused_at_the_check_and_in_the_run(
    server: Server, scale: float, shift: float, k: int
) -> None:
    ids = np.asarray(server.tokenizer("7+5-9=7+5=2,2-9=3.3")["input_ids"], dtype=np.int32)
    n = len(ids) - 7
    rollout = Rollout(0, ids, 7, np.ones(n, bool), np.zeros(n, np.float32), [(0, 0, n)], "stop")
    target = TeacherTargets("sampled", logprobs=torch.zeros(n))
    if k:
        target = TeacherTargets(
            "topk",
            logprobs=torch.zeros(n),
            topk_logprobs=torch.zeros(n, k),
            topk_ids=torch.zeros(n, k, dtype=torch.int32),
        )
    teacher(server).score([rollout], [target])
    sound = target.logprobs
    assert sound is not None
    assert (sound <= 0).all()
    server.scale, server.shift = scale, shift
    for asked in (
        lambda: teacher(server).check(server.tokenizer, ids, k),
        lambda: teacher(server).score([rollout], [target]),
    ):
        with pytest.raises(
            UserError, match=r"gives values that are no log-probs: .* --logprobs-mode"
        ) as error:
            asked()
        assert server.url in str(error.value)
