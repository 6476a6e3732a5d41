"""The timeline of a run, for Perfetto, chrome://tracing and `fopd report`: one track per worker. Needs no
torch.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fopd_cli.files import Appender, Refused, write_synced

if TYPE_CHECKING:
    from fopd_cli.runtime.crew.messages import Span


class Trace:
    """Chrome trace events, a JSON list that is complete at any moment: each event is written together with
    the list's end, over the previous end. A resumed run adds to it, and each worker keeps its track.
    """

    END = b"\n]\n"

    def __init__(self, path: Path, refused: Refused | None = None) -> None:
        """`refused`: see `Appender`. Raises `OSError`."""
        events = _events(path)
        self._tracks = {e["args"]["name"]: e["tid"] for e in events if e.get("ph") == "M"}
        if not events:
            path.write_bytes(b"[" + self.END)
        self.file = Appender(path, self.END, refused)
        self._empty = not events

    def add(self, track: str, span: Span) -> None:
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks) + 1
            tid = self._tracks[track]
            self._write({"name": "thread_name", "ph": "M", "pid": 1, "tid": tid, "args": {"name": track}})
        self._write(
            {
                "name": span.name,
                "ph": "X",
                "pid": 1,
                "tid": self._tracks[track],
                "ts": round(span.start * 1e6),
                "dur": max(1, round((span.end - span.start) * 1e6)),
                "args": span.args,
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        text = ("\n" if self._empty else ",\n") + json.dumps(event)
        self._empty = False
        self.file.write(text.encode())

    def close(self) -> None:
        self.file.close()


def _events(path: Path) -> list[dict[str, Any]]:
    """The events in a trace file. A file that was cut short is repaired first."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    events = read_trace(text)
    whole = ("[\n" + ",\n".join(map(json.dumps, events)) if events else "[") + Trace.END.decode()
    if events and text != whole:
        write_synced(path, whole)
    return events


def read_trace(text: str) -> list[dict[str, Any]]:
    """The events of a trace, one per line; a last one that was cut short is left out."""
    events = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line.strip().rstrip(","))
            if isinstance(event, dict):
                events.append(event)
    return events
