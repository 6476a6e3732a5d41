"""A whole run with real engines in the test's own process, on a virtual clock, which takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fopd_cli.inputs import load_inputs
from fopd_cli.recipe import Recipe, dump_recipe
from fopd_cli.runtime.conductor import Conductor
from fopd_cli.runtime.crew.inprocess import InProcess, LocalEngines
from fopd_cli.runtime.journal.journal import Journal
from fopd_cli.runtime.journal.saving import Unsaved
from fopd_cli.runtime.journal.sinks import Recorded
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.signals import Signals
from fopd_cli.runtime.state import State


class Units:
    """Every answer takes a unit of the clock."""

    def ends(self, now: float, engine: Any, command: Any, answers: Any) -> list[float]:
        return [now + 1.0 for _ in answers]

    def stopped(self, now: float, engine: Any) -> None: ...


def conducted(recipe: Recipe, folder: Path) -> Path:
    """A whole run with real engines in this process; its directory as far as reports read it."""
    state = State(load_inputs(recipe, place(recipe, 0)))
    setup = state.inputs.setup(state.buffer.arena.memory, folder)
    written = Recorded()
    with Journal(recipe, state.inputs.tokenizer, lambda *_: written, quiet=True) as journal:
        crew = InProcess(LocalEngines(state.inputs.plan, setup), Units())
        Conductor(state, crew, journal, Unsaved(), Signals(journal.say)).run()
    run = folder / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r, default=float) + "\n" for r in written.metrics))
    (run / "samples.jsonl").write_text("".join(json.dumps(r, default=str) + "\n" for r in written.samples))
    return run
