"""`--live`: what is shown with and without a terminal, and that a run survives a broken view."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path
from typing import Any, TextIO

import pytest
from conftest import SLOW, Fopd, metrics, small_recipe

from fopd_cli.errors import Interrupted
from fopd_cli.runtime.journal import live
from fopd_cli.runtime.journal.sinks import Progress

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
FIGURES = {"score": "0.50", "kl": "0.1234", "left": "12 min", "busy": "S80%"}
EVALUATION = {
    "step": 3,
    "score": 0.5,
    "score_error": 0.1,
    "prompts": 8,
    "kl": 0.2,
    "kl_error": 0.01,
    "truncated": 0.0,
}


class Terminal:
    """A real terminal: what is written to `file` is collected."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.file: TextIO = os.fdopen(slave, "w", buffering=1)
        self._seen = bytearray()
        self._woken, self._wake = os.pipe()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while self.master in select.select([self.master, self._woken], [], [])[0]:
            try:
                self._seen += os.read(self.master, 1 << 16)
            except OSError:
                return

    def hang_up(self) -> None:
        """Close it under the writer. The reader ends first: the next terminal may get the same descriptor."""
        os.write(self._wake, b"x")
        self._reader.join(timeout=20)
        os.close(self.master)

    def text(self) -> str:
        """Everything shown, once the writer has closed it."""
        self.file.close()
        self._reader.join(timeout=20)
        return CODES.sub("", self._seen.decode())


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal until the test ends."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made.file)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return made


def sample(response: str) -> dict[str, Any]:
    return {"kind": "eval", "step": 3, "prompt": "7+5=", "response": response, "score": 1.0}


def test_step_figures_time_left_busy_roles_and_the_newest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    view = live.view(10, 0)
    assert isinstance(view, live.View)
    view.sampled(sample("7+5=2.2 [bold]as it is[/bold]"))
    view.evaluated(EVALUATION)
    view.say("a line of the run [/] with brackets")
    view.step(10, FIGURES, {"sampler": 0.8, "learner": 0.25})
    view.close()
    text = terminal.text()
    last = text[text.rindex("step 10/10") :]
    for shown in (
        "12 min left",
        "kl 0.1234",
        "sampler",
        "80% busy",
        "25% busy",
        "held out, step 3, score 1.00",
    ):
        assert shown in last, shown
    assert "7+5=2.2 [bold]as it is[/bold]" in last
    assert "held-out at step 3: score 0.500 ± 0.100 (8 prompts), KL to the teacher 0.2000" in last
    assert "a line of the run [/] with brackets" in text


def test_a_terminal_that_closes_ends_only_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(live, "EVERY_S", 0.0)  # every step tries to draw
    view = live.view(10, 0)
    view.step(1, FIGURES, {"sampler": 0.8})
    terminal.hang_up()
    for step in range(2, 11):
        view.step(step, FIGURES, {})
        view.say("unheard")
    view.evaluated(EVALUATION)
    view.close()


def test_a_view_that_fails_is_replaced_and_a_second_signal_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = terminal_of(monkeypatch)
    view = live.view(10, 0)
    assert isinstance(view, live.View)
    view.evaluated({"step": "of another version"})  # what it shows cannot be drawn
    assert isinstance(view._instead, Progress)
    view.step(10, FIGURES, {})
    view.close()
    text = terminal.text()
    assert "--live: the view failed (KeyError" in text
    assert "10/10" in text

    def interrupt() -> None:
        raise Interrupted("stopped at once")

    with pytest.raises(Interrupted):
        view._safely(interrupt)


@pytest.mark.parametrize("term", ["", "dumb"])
def test_where_there_is_no_terminal_one_line_says_so(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.setenv("TERM", term)
    view = live.view(2, 0)
    for step in (1, 2):
        view.step(step, FIGURES, {"sampler": 0.8})
    view.close()
    first, *rest = written.getvalue().splitlines()
    assert first.startswith("--live: standard error is not a terminal that can be drawn on")
    assert rest[-1].startswith("step 2/2  score 0.50")


@SLOW
def test_a_run_with_a_view_is_the_same_run(fopd: Fopd, pair: Path) -> None:
    recipe = fopd.recipe(small_recipe(pair))
    plain = fopd("run", recipe, "--run-dir", fopd.folder / "plain", "--live")
    assert plain.err.count("--live: standard error is not a terminal") == 1
    terminal = Terminal()
    command = [sys.executable, "-m", "fopd_cli", "run", recipe, "--run-dir", fopd.folder / "seen", "--live"]
    environment = {**fopd.environment, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    subprocess.run(
        [str(c) for c in command],
        cwd=fopd.folder,
        env=environment,
        stderr=terminal.file,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )
    text = terminal.text()
    assert "step 4/4" in text
    assert "% busy" in text
    assert "held-out at step 4" in text
    assert metrics(fopd.folder / "seen") == metrics(fopd.folder / "plain")
