"""`--live`: a view of the run in a terminal. It draws when something is new and has no thread of its own. If
anything goes wrong with it, the run goes on without it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fopd_cli.errors import Interrupted
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.sinks import Display, Progress

ROLES = ("sampler", "teacher", "learner", "grader", "environment")
BAR = 40  # columns
ANSWER_LINES = 6
EVERY_S = 0.2  # between two redraws


def view(steps: int, initial: int) -> Display:
    """The live view if there is a terminal, else plain progress lines and a line that says so."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return View(steps, initial, console)
    plain = Progress(steps, initial)
    plain.say("--live: standard error is not a terminal that can be drawn on; plain lines instead")
    return plain


class View:
    """See `Display`."""

    def __init__(self, steps: int, initial: int, console: Console) -> None:
        self.steps, self._step, self._console = steps, initial, console
        self._metrics: dict[str, str] = {}
        self._busy: dict[str, float] = {}
        self._evaluation: Mapping[str, Any] | None = None
        self._sample: Mapping[str, Any] | None = None
        self._drawn = 0.0
        self._instead: Display | None = None
        self._live = Live(self._picture(), console=console, auto_refresh=False)
        self._safely(self._live.start)
        self._safely(lambda: console.show_cursor(True))  # a killed run could not restore it

    # ---- what happened -------------------------------------------------------------------------------------

    def step(self, step: int, metrics: dict[str, str], busy: Mapping[str, float]) -> None:
        self._step, self._metrics, self._busy = step, metrics, dict(busy)
        if self._instead is not None:
            self._instead.step(step, metrics, busy)
        elif time.monotonic() - self._drawn > EVERY_S or step == self.steps:
            self._draw()

    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._evaluation = record
        self._draw()

    def sampled(self, record: Mapping[str, Any]) -> None:
        self._sample = record

    def say(self, line: str) -> None:
        if self._instead is None:
            text = Text(line)  # no markup: brackets are plain text
            self._safely(lambda: self._console.print(text, soft_wrap=True))
        if self._instead is not None:
            self._instead.say(line)

    def close(self) -> None:
        if self._instead is None:
            self._draw()
            self._safely(self._live.stop)
        if self._instead is not None:
            self._instead.close()

    # ---- drawing -------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        if self._instead is None:
            self._drawn = time.monotonic()
            self._safely(lambda: self._live.update(self._picture(), refresh=True))

    def _safely(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Interrupted:  # a second signal while drawing
            raise
        except Exception as error:  # of any kind: a mere display must never end a run
            with contextlib.suppress(Exception):
                self._live.stop()
            self._instead = Progress(self.steps, self._step)
            self._instead.say(f"--live: the view failed ({type(error).__name__}: {error}); the run goes on")

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress(), self._numbers()]
        if self._evaluation is not None:
            parts.append(Text(records.evaluation_line(dict(self._evaluation))))
        if self._busy:
            parts.append(self._bars())
        if self._sample is not None:
            parts.append(self._answer(self._sample))
        return Group(*parts)

    def _progress(self) -> RenderableType:
        left = self._metrics.get("left")
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(f"step {self._step}/{self.steps}", style="bold"),
            ProgressBar(total=max(1, self.steps), completed=self._step, width=BAR),
            Text("starting" if not self._metrics else "" if left is None else f"{left} left"),
        )
        return row

    def _numbers(self) -> RenderableType:
        shown = {name: value for name, value in self._metrics.items() if name not in ("left", "busy")}
        return Text("   ".join(f"{name} {value}" for name, value in shown.items()))

    def _bars(self) -> RenderableType:
        rows = Table.grid(padding=(0, 1))
        for role in (r for r in ROLES if r in self._busy):
            share = self._busy[role]
            rows.add_row(role, ProgressBar(total=1.0, completed=share, width=BAR), f"{share:.0%} busy")
        return rows

    def _answer(self, sample: Mapping[str, Any]) -> RenderableType:
        score = sample.get("score")
        graded = f", score {score:.2f}" if score is not None and math.isfinite(score) else ""
        asked = Text(_short(str(sample["prompt"]), ANSWER_LINES // 2), style="dim")
        kind = "held out" if sample["kind"] == "eval" else "training"
        answer = Text(_short(str(sample["response"]), ANSWER_LINES))
        title = Text(f"{kind}, step {sample['step']}{graded}")
        return Panel(Group(asked, answer), title=title, title_align="left")


def _short(text: str, lines: int) -> str:
    """The first lines, short enough to read at a glance."""
    kept = text.strip().splitlines()
    shown = "\n".join(line[:300] for line in kept[:lines])
    return shown + (" …" if len(kept) > lines or any(len(line) > 300 for line in kept) else "")
