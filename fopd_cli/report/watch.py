"""`fopd report --watch`: serves the page on a loopback address, rebuilt while the runs go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fopd_cli.errors import UserError
from fopd_cli.report.page import page
from fopd_cli.report.reading import holder, read

LOCAL = "127.0.0.1"
WATCHED = ("metrics.jsonl", "warnings.jsonl", "suite.jsonl", "summary.json", "recipe.yaml")


def server(paths: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Listens only on the loopback address; port 0 takes any. Raises `UserError`."""
    for path in paths:
        read(path)  # fails now if it is not a run

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (LOCAL, "localhost"):  # another site whose name resolves to our address
                self.send_error(403)
            elif self.path == "/news":
                self._answer("text/plain", news(paths))
            elif self.path == "/":
                try:
                    self._answer("text/html", page([read(path) for path in paths], watching=True))
                except UserError as error:  # the run was moved away
                    self._answer("text/plain", str(error))
            else:
                self.send_error(404)

        def _answer(self, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with contextlib.suppress(OSError):  # the browser did not wait
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing: a request comes every two seconds."""

    try:
        return ThreadingHTTPServer((LOCAL, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: cannot listen on {port}: {error}; give another") from None


def watch(paths: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C."""
    with server(paths, port) as http:
        say(f"http://{LOCAL}:{http.server_address[1]}/ (Ctrl-C ends it)")
        http.serve_forever()


def news(paths: Sequence[Path]) -> str:
    """A string that changes whenever there is something new to show."""
    found = []
    for path in paths:
        for name in WATCHED:
            with contextlib.suppress(OSError):
                at = (path / name).stat()
                found.append(f"{at.st_size}-{at.st_mtime_ns}")
        found.append(str(holder(path / "run.lock")))
    return " ".join(found)
