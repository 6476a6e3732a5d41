"""Misbehaving remote teachers: real sockets on this machine, and the check at a run's start."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from fopd_cli.engines.building import TooLong
from fopd_cli.engines.http import teacher as http_teacher
from fopd_cli.engines.http.teacher import HttpServer, HttpTeacher, Unreachable
from fopd_cli.errors import UserError
from fopd_cli.samples import Rollout, TeacherTargets

Serve = Callable[[socket.socket], None]
LIMIT_S = 2.0  # instead of ten seconds


class Tokenizer:
    """Ids are bytes."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture
def listening() -> Iterator[Callable[[Serve], str]]:
    """Starts a server that handles every connection with `Serve`; returns its URL. It ends with the test."""
    sockets: list[socket.socket] = []

    def start(serve: Serve) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    sockets.append(connection)
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"

    yield start
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def request(connection: socket.socket) -> dict[str, object]:
    """Reads one request to its end; returns its JSON."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += connection.recv(65536)
    head, _, body = raw.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    return json.loads(body)


def answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def reply(status: str, body: str, *headers: str) -> Serve:
    def serve(connection: socket.socket) -> None:
        request(connection)
        connection.sendall(answer(status, body.encode(), *headers))

    return serve


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def drip(text: bytes) -> Serve:
    """Send a byte now and then, never all of them."""

    def serve(connection: socket.socket) -> None:
        request(connection)
        connection.sendall(text)
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)

    return serve


def slam(connection: socket.socket) -> None:
    connection.recv(1)


def server(url: str, **changes: object) -> HttpServer:
    return replace(HttpServer(url, "teacher", None, 4, 120.0, 5), **changes)  # type: ignore[arg-type]


def verdict(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(http_teacher, "CHECK_S", LIMIT_S)
    with pytest.raises(UserError) as error:
        HttpTeacher(server(url), 256).check(Tokenizer(), np.arange(5), 4)
    assert url in str(error.value)
    return str(error.value)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PAGE = "<!doctype html><html><body>Welcome</body></html>"


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (silent, "accepts connections, but no answer within"),
        (drip(HEAD + b"X-Slow: "), "accepts connections, but no answer within"),
        (drip(HEAD + b'\r\n{"choices": [ '), "an answer that was not complete after"),
        (drip(HEAD + b"Content-Length: 100000\r\n\r\n"), "an answer that was not complete after"),
        (drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n"), "status 500"),
        (slam, "teacher.http.url: .* failed"),
        (reply("200 OK", PAGE, "Content-Type: text/html"), "answers with a web page"),
        (reply("200 OK", "well, hello"), "no JSON: b'well, hello'"),
        (reply("200 OK", "[1, 2]"), "does not answer like an OpenAI-compatible server"),
        (reply("200 OK", '{"choices": [3]}'), "does not answer like an OpenAI-compatible server"),
        (reply("404 Not Found", PAGE), r"has no /completions \(a web page\)"),
        (reply("404 Not Found", '{"error": {"message": "no such model"}}'), "no such model"),
        (reply("404 Not Found", '{"error": null}'), "knows no model 'teacher'"),
        (reply("401 Unauthorized", "{}"), "teacher.http.api_key_env"),
        (reply("301 Moved", "", "Location: https://elsewhere/v1"), "redirects to https://elsewhere/v1"),
        (reply("307 Temporary", "", "Location: /login"), "redirects to /login"),
        (reply("503 Busy", "later"), "status 503: later"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.9\r\n"), "teacher.http.url: .* failed"),
    ],
)
def test_the_check_at_the_start_says_which_server_and_what_happened(
    listening: Callable[[Serve], str], monkeypatch: pytest.MonkeyPatch, serve: Serve, message: str
) -> None:
    """The defaults are five retries of two minutes; the check has its own timeouts."""
    assert re.search(message, said := verdict(listening(serve), monkeypatch)), said


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    said = verdict(url, monkeypatch)
    assert "refused" in said.lower()
    assert "is the server up" in said


def test_a_run_waits_for_the_whole_of_an_answer_no_longer_than_its_timeout(
    listening: Callable[[Serve], str],
) -> None:
    """Each byte of a dripping answer comes in time; the whole answer never would."""
    url = listening(drip(HEAD + b'\r\n{"choices": ['))
    with pytest.raises(Unreachable, match="failed 2 times"):
        HttpTeacher(server(url, timeout_s=0.3, retries=1), 256)._post({"prompt": "x"})


def test_a_sound_server_passes_and_what_can_pass_is_tried_again(listening: Callable[[Serve], str]) -> None:
    refusals = [1]

    def serve(connection: socket.socket) -> None:
        asked = request(connection)
        if refusals:
            refusals.pop()
            connection.sendall(answer("503 Busy", b"loading"))
            return
        prompt = asked["prompt"]
        ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
        choice = {"prompt_token_ids": ids, "prompt_logprobs": [None] * len(ids)}  # type: ignore[arg-type]
        connection.sendall(answer("200 OK", json.dumps({"choices": [choice]}).encode()))

    HttpTeacher(server(listening(serve)), 256).check(Tokenizer(), np.arange(5), 4)
    assert not refusals


def judged(asked: dict[str, object]) -> bytes:
    """A correct server's answer: the log-prob of every token but the first."""
    ids: list[int] = asked["prompt"]  # type: ignore[assignment]
    entries = [None, *({str(i): {"logprob": -1.5, "rank": 1}} for i in ids[1:])]
    return json.dumps({"choices": [{"prompt_logprobs": entries}]}).encode()


def rollout(key: int, length: int) -> Rollout:
    n = length - 2
    ids = np.arange(length, dtype=np.int32) + key
    return Rollout(key, ids, 2, np.ones(n, bool), np.zeros(n, np.float32), [(0, 0, n)], "stop")


def test_connections_stay_open_and_no_more_than_allowed_are_opened(listening: Callable[[Serve], str]) -> None:
    opened, at_once, most = [], threading.Semaphore(3), threading.Lock()

    def serve(connection: socket.socket) -> None:
        opened.append(connection)
        while True:
            asked = request(connection)
            with most:
                assert at_once.acquire(blocking=False)
            time.sleep(0.01)
            at_once.release()
            body = judged(asked)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    teacher = HttpTeacher(server(listening(serve), concurrency=3, retries=0), 256)
    for _ in range(2):  # calls of a run, one after the other
        rollouts = [rollout(key, 5) for key in range(12)]
        targets = [TeacherTargets("sampled", logprobs=torch.zeros(3)) for _ in rollouts]
        teacher.score(rollouts, targets)
        assert all((t.logprobs == -1.5).all() for t in targets)  # type: ignore[union-attr]
    assert len(opened) <= 3
    teacher.close()


def test_one_sample_that_is_refused_ends_the_call_with_its_reason(listening: Callable[[Serve], str]) -> None:
    def serve(connection: socket.socket) -> None:
        asked = request(connection)
        long = len(asked["prompt"]) > 5  # type: ignore[arg-type]
        said = b'{"error": {"message": "the maximum model length is 5"}}'
        connection.sendall(answer("400 Bad", said) if long else answer("200 OK", judged(asked)))

    rollouts = [rollout(0, 5), rollout(1, 8), rollout(2, 5)]
    targets = [TeacherTargets("sampled", logprobs=torch.zeros(r.response_length)) for r in rollouts]
    with pytest.raises(TooLong, match=r"a sample of 8 tokens as too long .*maximum model length is 5"):
        HttpTeacher(server(listening(serve)), 256).score(rollouts, targets)


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://there")
    with pytest.raises(UserError, match=r"teacher.http: .*nonsense.*_PROXY"):
        HttpTeacher(server("http://there/v1"), 256)
