"""All state that changes during a run and is not an engine's own: what a checkpoint holds beside the
learner.
"""

from __future__ import annotations

from fopd_cli.inputs import Inputs
from fopd_cli.runtime.buffer import Buffer
from fopd_cli.runtime.control import Control
from fopd_cli.runtime.memory.sizes import arena_bytes
from fopd_cli.runtime.scheduling.prompts import evaluation_ids, schedule_config
from fopd_cli.runtime.scheduling.schedule import Schedule


class State:
    """Starts as at the beginning of a run."""

    def __init__(self, inputs: Inputs) -> None:
        recipe, plan, stream = inputs.recipe, inputs.plan, inputs.stream
        self.inputs = inputs
        self.buffer = Buffer(inputs.target_specs, arena_bytes(recipe, inputs.target_specs))
        self.control = Control(recipe)
        self.schedule = Schedule(
            schedule_config(recipe, len(plan.samplers), plan.exclusive, stream.reexecutable),
            stream.train_id,
            evaluation_ids(recipe, stream),
            self.buffer.reserve,
            self.buffer.release,
            stream.teacher,
        )
        self.schedule.ahead = self.control.ahead
