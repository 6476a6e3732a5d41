"""A remote teacher: an OpenAI-compatible server that returns prompt log-probs for token ids, as `vllm serve` does.

One request a sample: its token ids as the prompt, `prompt_logprobs: k`, one token generated because none is refused.
Requests go out side by side, at most `concurrency` of them; what can pass (a refused connection, a time-out, status
408, 429 and 5xx) is tried again with doubling pauses, what cannot (a wrong key, an unknown model, a k over the
server's limit) is the user's to mend and says so.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fopd_cli.engines.topk import first_k, log_shared
from fopd_cli.errors import UserError
from fopd_cli.samples import Rollout, TeacherTargets

FIRST_PAUSE_S = 0.5
TRANSIENT = {408, 429, 500, 502, 503, 504}
PROBES = ("2+2=4, é ß 中文 🙂\n\n\tif x >= 10: return 'done'", "The answer is \\boxed{42}.  <|im_end|> </s>")


class Unreachable(Exception):
    """The server failed so often that it is given up; in the middle of a run the worker fails and is started again."""


@dataclass(frozen=True)
class HttpServer:
    """Where it is and how to talk to it; `url` ends before `/completions`."""

    url: str
    model: str
    api_key: str | None
    concurrency: int
    timeout_s: float
    retries: int


class HttpTeacher:
    """Implements `protocols.Teacher`. Ids from `vocab` on are padding that the student does not have."""

    def __init__(self, server: HttpServer, vocab: int) -> None:
        self.server, self.vocab = server, vocab
        self._pool = ThreadPoolExecutor(server.concurrency)

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        list(self._pool.map(self._score, rollouts, targets))

    def head(self) -> None:
        """It stays with the server."""

    def sleep(self) -> None:
        """It holds nothing here."""

    def wake(self) -> None:
        pass

    def check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        """Raises `UserError` unless the server answers, has our token ids and gives prompt log-probs for them."""
        try:
            self._check(tokenizer, probe, k)
        except Unreachable as error:
            raise UserError(f"{error}; is the server up?") from None

    def _check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        for text in PROBES:
            ours = list(map(int, tokenizer(text)["input_ids"]))
            theirs = self._choice(self._post({"prompt": text, "return_token_ids": True})).get("prompt_token_ids")
            if theirs is None:
                raise UserError(
                    f"teacher.http.url: {self.server.url} does not say its token ids (return_token_ids), so it cannot be "
                    "checked that its tokenizer is the student's; use a server that does (vLLM 0.10 and later)"
                )
            if ours != theirs:
                raise UserError(
                    f"teacher.http.url: {self.server.url} has another tokenizer than the student: {text!r} is {theirs[:12]} "
                    f"there and {ours[:12]} here; choose a teacher of the student's family"
                )
        self._prompt_logprobs(probe, k)

    def _score(self, rollout: Rollout, target: TeacherTargets) -> None:
        wanted = 0 if target.topk_ids is None else target.topk_ids.shape[-1]
        context = rollout.judged
        found = self._prompt_logprobs(context.token_ids, wanted)
        at = context.positions.clip(min=1)  # a position that the context does not have gets some row; nobody reads it
        entries, tokens = [found[i] for i in at], context.token_ids[at]
        assert target.logprobs is not None
        target.logprobs.copy_(
            torch.tensor([entry[str(token)]["logprob"] for entry, token in zip(entries, tokens, strict=True)])
        )
        if target.topk_logprobs is not None and target.topk_ids is not None:
            # The sampled token stands among them even if it is not likely; the others are the k likeliest.
            likely = [[e for e in entry.items() if e[1]["rank"] <= wanted] for entry in entries]
            ids = torch.tensor([[int(token) for token, _ in row] for row in likely])
            logprobs = torch.tensor([[found["logprob"] for _, found in row] for row in likely])
            values, top = first_k(ids, logprobs, self.vocab, wanted)
            shared = log_shared(ids, logprobs, self.vocab)
            target.logprobs.sub_(shared)
            target.topk_logprobs.copy_(values - shared[:, None])
            target.topk_ids.copy_(top)

    def _prompt_logprobs(self, ids: np.ndarray, k: int) -> list[dict[str, Any]]:
        """One entry a token: id -> log-prob and rank; the first one's is empty."""
        body = {"prompt": ids.tolist(), "prompt_logprobs": k}
        found = self._choice(self._post(body)).get("prompt_logprobs")
        if found is None or len(found) != len(ids):
            raise UserError(
                f"teacher.http.url: {self.server.url} returned no prompt log-probs; fopd needs a server that knows "
                "`prompt_logprobs` on /completions, such as vllm serve"
            )
        return [entry or {} for entry in found]

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise UserError(f"teacher.http.url: {self.server.url} does not answer like an OpenAI-compatible server")
        return dict(choices[0])

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        server, pause = self.server, FIRST_PAUSE_S
        payload = {"model": server.model, "max_tokens": 1, "temperature": 1.0, **body}
        headers = {"Content-Type": "application/json"}
        if server.api_key:
            headers["Authorization"] = f"Bearer {server.api_key}"
        request = urllib.request.Request(f"{server.url}/completions", json.dumps(payload).encode(), headers)
        for attempt in range(server.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=server.timeout_s) as response:
                    return dict(json.load(response))
            except urllib.error.HTTPError as error:
                said = _said(error)
                if error.code not in TRANSIENT:
                    raise UserError(_refused(server, error.code, said)) from None
                trouble = f"status {error.code}: {said}"
            except (OSError, json.JSONDecodeError) as error:  # refused, timed out, cut off
                trouble = str(getattr(error, "reason", None) or error) or type(error).__name__
            if attempt < server.retries:
                time.sleep(pause)
                pause *= 2
        raise Unreachable(f"teacher.http.url: {server.url} failed {server.retries + 1} times, last with {trouble}")


def _refused(server: HttpServer, code: int, said: str) -> str:
    if code in (401, 403):
        return f"teacher.http.api_key_env: {server.url} refuses the API key ({code}: {said})"
    if code == 404:
        return f"teacher.model: {server.url} knows no model {server.model!r} there, or has no /completions ({said})"
    return (
        f"teacher.http: {server.url} refuses the request ({code}: {said}); is teacher.k over the server's max_logprobs?"
    )


def _said(error: urllib.error.HTTPError) -> str:
    """The server's message, in one line."""
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
        text = str(answer.get("error", {}).get("message") or answer.get("message") or text)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]
