"""How a remote teacher is reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fopd_cli.engines.building import TeacherOrder
from fopd_cli.engines.http.teacher import HttpServer, HttpTeacher
from fopd_cli.errors import UserError
from fopd_cli.recipe import Teacher as TeacherSection


def missing() -> None:
    """`HttpTeacher.check` finds out whether the server is up."""


def refusals(key: str, section: TeacherSection, config: Any) -> Iterator[tuple[str, str]]:
    """Its model is not here to be checked."""
    yield from ()


def teacher(order: TeacherOrder) -> HttpTeacher:
    return remote(order.section, order.vocab)


def remote(section: TeacherSection, vocab: int) -> HttpTeacher:
    """Raises `UserError` if its API key is not set."""
    h = section.http
    key = os.environ.get(h.api_key_env) if h.api_key_env else None
    if h.api_key_env and not key:
        raise UserError(f"teacher.http.api_key_env: the environment variable {h.api_key_env} is not set")
    assert h.url is not None
    server = HttpServer(h.url.rstrip("/"), section.model, key, h.concurrency, h.timeout_s, h.retries)
    return HttpTeacher(server, vocab)
