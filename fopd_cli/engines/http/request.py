"""One request to a server, over connections that stay open.

The timeout covers the whole request: a server that trickles bytes is as lost as one that sends none.
Redirects are not followed: another address would get the API key for this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import Callable
from typing import Any

import httpx

from fopd_cli.errors import UserError

MOST_BYTES = 1 << 30  # of an answer
MOST_OF_AN_ERROR = 10_000  # bytes of an error body
IDLE_S = 2.0  # that an idle connection is kept; many servers close theirs after five


class NoAnswer(Exception):
    """What happened instead of an answer; it may be temporary."""


class Refused(Exception):
    """An answer that says no."""

    def __init__(self, code: int, said: str, location: str | None = None) -> None:
        super().__init__(said)
        self.code, self.said, self.location = code, said, location


class Connections:
    """At most `most` at once; a request's time starts when its turn comes."""

    def __init__(self, api_key: str | None, most: int) -> None:
        self._turn = asyncio.Semaphore(most)
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=IDLE_S)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                limits=limits,
                timeout=None,  # httpx's own are for each read
                verify=ssl.create_default_context(),  # this machine's certificates
            )
        except (ImportError, ValueError) as error:  # a proxy in the environment that it cannot use
            raise UserError(
                f"teacher.http: {' '.join(str(error).split())}; look at the *_PROXY variables"
            ) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, url: str, body: dict[str, Any] | None, seconds: float | Callable[[], float]) -> Any:
        """The JSON that a server answers within `seconds` in all. Raises `NoAnswer` or `Refused`."""
        async with self._turn:
            limit = seconds() if callable(seconds) else seconds
            seen = _Seen()
            try:
                async with asyncio.timeout(limit):
                    await self._read(url, body, seen)
            except TimeoutError:
                seen.trouble = seen.verdict(limit)
            except (httpx.RequestError, httpx.InvalidURL, OSError, ValueError) as error:
                seen.trouble = _first_cause(error)
        return seen.answer()

    async def _read(self, url: str, body: dict[str, Any] | None, seen: _Seen) -> None:
        method = "GET" if body is None else "POST"
        async with self._client.stream(method, url, json=body, extensions={"trace": seen.trace}) as response:
            seen.response = response
            most = MOST_BYTES if response.is_success else MOST_OF_AN_ERROR
            async for part in response.aiter_bytes():
                seen.raw += part
                if len(seen.raw) > most:
                    return


class _Seen:
    """How far a request got."""

    def __init__(self) -> None:
        self.connected = False
        self.response: httpx.Response | None = None
        self.raw = bytearray()
        self.trouble: str | None = None

    async def trace(self, event: str, info: Any) -> None:
        self.connected |= event.startswith("http11.")

    def verdict(self, limit: float) -> str:
        if self.response is not None:
            return f"an answer that was not complete after {limit:.0f} s"
        connected = "it accepts connections, but" if self.connected else "there was"
        return f"{connected} no answer within {limit:.0f} s"

    def answer(self) -> Any:
        response = self.response
        if response is not None and not response.is_success:  # whatever happened to the rest of it
            said = _message(bytes(self.raw[:MOST_OF_AN_ERROR]))
            raise Refused(response.status_code, said, response.headers.get("Location"))
        if self.trouble is not None:
            raise NoAnswer(self.trouble)
        if len(self.raw) > MOST_BYTES:
            raise Refused(200, f"an answer of more than {MOST_BYTES >> 20} MB")
        try:
            return json.loads(self.raw)
        except ValueError:
            if self.raw.lstrip()[:1] == b"<":
                raise Refused(200, "a web page") from None
            raise NoAnswer(f"an answer that is no JSON: {bytes(self.raw[:80])!r}") from None


def _first_cause(error: BaseException) -> str:
    """The underlying cause, on one line: httpx says only that all attempts failed."""
    while True:
        inner = (
            error.exceptions[0]
            if isinstance(error, BaseExceptionGroup)
            else error.__cause__ or error.__context__
        )
        if inner is None:
            break
        error = inner
    if isinstance(error, OSError) and error.errno and error.errno > 0 and not isinstance(error, ssl.SSLError):
        return f"[Errno {error.errno}] {os.strerror(error.errno)}"  # asyncio has its own wording
    return " ".join(str(error).split()) or type(error).__name__


def _message(raw: bytes) -> str:
    """What a server says in the body of an error, on one line."""
    text = raw.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        answer = json.loads(text)
        text = str((answer.get("error") or {}).get("message") or answer.get("message") or text)
    if text.lstrip().startswith("<"):
        return "a web page"
    return " ".join(text.split())[:300]
