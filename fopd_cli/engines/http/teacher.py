"""A remote teacher: an OpenAI-compatible server that returns prompt log-probs for token ids, as `vllm serve`
does.

One request per sample: its token ids as the prompt, `prompt_logprobs: k`, and one generated token because
zero is refused. Requests go out in parallel, at most `concurrency` of them, over connections that stay open.

Errors that may pass (a refused connection, a timeout, status 408, 429, 500, 502, 503 and 504) are retried
with doubling pauses. Those that cannot (a wrong key, an unknown model, a redirect, a web page, a k over the
server's limit) are reported for the user to fix. `request.py` makes one request.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fopd_cli.engines.building import TooLong
from fopd_cli.engines.http.request import Connections, NoAnswer, Refused
from fopd_cli.engines.tokens.topk import first_k, log_shared
from fopd_cli.errors import UserError
from fopd_cli.samples import Rollout, TeacherTargets

FIRST_PAUSE_S = 0.5
CHECK_S = 10.0  # for all requests of the startup check, which has its own retry limit
CHECK_RETRIES = 2
MODELS_S = 3.0  # for asking how long its context is, which it need not answer
MASS_TOLERANCE = 0.01
TOO_LONG = re.compile(
    r"context length|max_model_len|too (?:long|many tokens)|maximum (?:input|model|sequence) length", re.I
)
TRANSIENT = {408, 429, 500, 502, 503, 504}
PROBES = ("2+2=4, é ß 中文 🙂\n\n\tif x >= 10: return 'done'", "The answer is \\boxed{42}.  <|im_end|> </s>")

Found = TypeVar("Found")


class Unreachable(Exception):
    """The server failed too often, so we give up on it. In the middle of a run the worker fails and is
    restarted.
    """


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
        self._until: float | None = None  # deadline of the check
        self._loop = asyncio.Runner()
        self._connections = Connections(server.api_key, server.concurrency)

    def score(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        self._run(self._score_all(rollouts, targets))

    async def _score_all(self, rollouts: Sequence[Rollout], targets: Sequence[TeacherTargets]) -> None:
        async with asyncio.TaskGroup() as group:
            for rollout, target in zip(rollouts, targets, strict=True):
                group.create_task(self._score(rollout, target))

    def head(self) -> None:
        """It stays on the server."""

    def sleep(self) -> None:
        """It holds nothing here."""

    def wake(self) -> None:
        pass

    def close(self) -> None:
        """Release a teacher that was only queried."""
        self._run(self._connections.close())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Found]) -> Found:
        """Run to the end; of several errors at once, raise the first."""
        try:
            return self._loop.run(work)
        except BaseExceptionGroup as errors:
            first: BaseException = errors
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None

    def check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        """Raises `UserError` unless the server answers, uses our token ids and gives prompt log-probs for
        them.

        `probe` is as long as the longest possible sample. Takes `CHECK_S` seconds at most, whatever the
        server does: users should not wait minutes to learn that it is down.
        """
        self._until = time.monotonic() + CHECK_S
        try:
            self._check(tokenizer, probe, k)
        except Unreachable as error:
            raise UserError(f"{error}; is the server up, and is this its address?") from None
        finally:
            self._until = None

    def _check(self, tokenizer: Any, probe: np.ndarray, k: int) -> None:
        for text in PROBES:
            ours = list(map(int, tokenizer(text)["input_ids"]))
            theirs = self._choice(self._post({"prompt": text, "return_token_ids": True})).get(
                "prompt_token_ids"
            )
            if theirs is None:
                raise UserError(
                    f"teacher.http.url: {self.server.url} does not say its token ids (return_token_ids), so "
                    "it cannot be checked that its tokenizer is the student's; use a server that does (vLLM "
                    "0.10 and later)"
                )
            if ours != theirs:
                raise UserError(
                    f"teacher.http.url: {self.server.url} has another tokenizer than the student: {text!r} "
                    f"is {theirs[:12]} there and {ours[:12]} here; choose a teacher of the student's family"
                )
        self._entries(self._post(_judging(probe, k)), probe, k)

    def context(self) -> int | None:
        """The context of the server's model in tokens; None if the server does not say or cannot be reached,
        which `check` reports.
        """
        server = self.server
        asked = self._connections.ask(f"{server.url}/models", None, min(server.timeout_s, MODELS_S))
        try:
            models = self._run(asked)["data"]
            return next((int(m["max_model_len"]) for m in models if m["id"] == server.model), None)
        except (NoAnswer, Refused, ValueError, KeyError, TypeError):
            return None

    async def _score(self, rollout: Rollout, target: TeacherTargets) -> None:
        wanted = 0 if target.topk_ids is None else target.topk_ids.shape[-1]
        context = rollout.judged
        answer = await self._answer(_judging(context.token_ids, wanted))
        found = self._entries(answer, context.token_ids, wanted)
        # a position that the context lacks gets an arbitrary row, which is never read
        at = context.positions.clip(min=1)
        entries, tokens = [found[i] for i in at], context.token_ids[at]
        assert target.logprobs is not None
        try:
            own = [entry[str(token)]["logprob"] for entry, token in zip(entries, tokens, strict=True)]
        except KeyError as error:
            raise UserError(
                f"teacher.http.url: {self.server.url} gives no log-prob of the prompt's own token {error}; "
                "fopd needs those of vLLM's `prompt_logprobs`, which has them beside the likeliest"
            ) from None
        target.logprobs.copy_(torch.tensor(own))
        if target.topk_logprobs is not None and target.topk_ids is not None:
            # The sampled token is included even if it is unlikely; the others are the k likeliest.
            likely = [[e for e in entry.items() if e[1]["rank"] <= wanted] for entry in entries]
            ids = torch.tensor([[int(token) for token, _ in row] for row in likely])
            logprobs = torch.tensor([[found["logprob"] for _, found in row] for row in likely])
            values, top = first_k(ids, logprobs, self.vocab, wanted)
            shared = log_shared(ids, logprobs, self.vocab)
            target.logprobs.sub_(shared)
            target.topk_logprobs.copy_(values - shared[:, None])
            target.topk_ids.copy_(top)

    def _entries(self, answer: Any, ids: np.ndarray, k: int) -> list[dict[str, Any]]:
        """An answer's entries, one per token: id -> log-prob and rank; the first one is empty."""
        found = self._choice(answer).get("prompt_logprobs")
        if found is None or len(found) != len(ids):
            raise UserError(
                f"teacher.http.url: {self.server.url} returned no prompt log-probs; fopd needs a server that "
                "knows `prompt_logprobs` on /completions, such as vllm serve"
            )
        entries = [entry or {} for entry in found]
        self._check_normalised(entries, k)
        return entries

    def _check_normalised(self, entries: list[dict[str, Any]], k: int) -> None:
        """The k likeliest of `vocab` tokens have a mass between k / vocab and 1; logits and other scores do
        not.
        """
        for entry in entries[1:]:
            logprobs = [math.nan if e["logprob"] is None else float(e["logprob"]) for e in entry.values()]
            mass = sum(math.exp(min(value, 700.0)) for value in logprobs)
            # the server may have more tokens than we do
            too_little = k > 0 and len(logprobs) >= k and mass < k / self.vocab / 2
            if not mass < 1 + MASS_TOLERANCE or too_little:  # catches nan, too
                raise UserError(
                    f"teacher.http.url: {self.server.url} gives values that are no log-probs: its "
                    f"{len(logprobs)} likeliest tokens of a position have a probability of {mass:.4g} "
                    "together; it must return those of the whole distribution at temperature 1 (vllm serve: "
                    "--logprobs-mode raw_logprobs)"
                )

    def _choice(self, answer: Any) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UserError(
                f"teacher.http.url: {self.server.url} does not answer like an OpenAI-compatible server"
            )
        return choices[0]

    def _post(self, body: dict[str, Any]) -> Any:
        return self._run(self._answer(body))

    async def _answer(self, body: dict[str, Any]) -> Any:
        """Raises `UserError` for errors that cannot pass, `Unreachable` if the server failed too often."""
        server, pause, tries, began = self.server, FIRST_PAUSE_S, 0, time.monotonic()
        retries = server.retries if self._until is None else min(server.retries, CHECK_RETRIES)
        payload = {"model": server.model, "max_tokens": 1, "temperature": 1.0, **body}
        while True:
            tries += 1
            try:
                return await self._connections.ask(f"{server.url}/completions", payload, self._seconds)
            except Refused as refused:
                if refused.code not in TRANSIENT:
                    kind = TooLong if TOO_LONG.search(refused.said) else UserError
                    raise kind(_refusal(server, refused, len(body["prompt"]))) from None
                trouble = f"status {refused.code}: {refused.said}"
            except NoAnswer as error:
                trouble = str(error)
            if tries > retries or (self._until is not None and time.monotonic() + pause >= self._until):
                break
            await asyncio.sleep(pause)
            pause *= 2
        how_often = "once" if tries == 1 else f"{tries} times"
        seconds = time.monotonic() - began
        raise Unreachable(
            f"teacher.http.url: {server.url} failed {how_often} in {seconds:.0f} s, last with: {trouble}"
        )

    def _seconds(self) -> float:
        """Seconds that the next request may take."""
        left = self.server.timeout_s if self._until is None else self._until - time.monotonic()
        return min(self.server.timeout_s, max(0.1, left))


def _judging(ids: np.ndarray, k: int) -> dict[str, Any]:
    return {"prompt": ids.tolist(), "prompt_logprobs": k}


def _refusal(server: HttpServer, refused: Refused, length: int) -> str:
    code, said = refused.code, refused.said
    if code in (401, 403):
        return f"teacher.http.api_key_env: {server.url} refuses the API key ({code}: {said})"
    if code == 404:
        return (
            f"teacher.model: {server.url} knows no model {server.model!r} there, or has no "
            f"/completions ({said})"
        )
    if TOO_LONG.search(said):
        return (
            f"teacher.http.url: {server.url} refuses a sample of {length} tokens as too long ({code}: "
            f"{said}); lower sampler.max_new_tokens, shorten the prompts, or serve the teacher with a longer "
            "context (vllm serve: --max-model-len)"
        )
    if 300 <= code < 400:
        return (
            f"teacher.http.url: {server.url} redirects to {refused.location or 'nowhere'} ({code}); "
            "give the address where it really is"
        )
    if code == 200:
        return (
            f"teacher.http.url: {server.url} answers with {said}, not like an OpenAI-compatible "
            "server; does its address end in /v1?"
        )
    hint = "; is teacher.k over the server's max_logprobs?" if "logprobs" in said else ""
    return f"teacher.http: {server.url} refuses the request ({code}: {said}){hint}"
