"""Questions without answers to grade: the teacher's distribution is all there is to learn from, and the
measure.
"""

from __future__ import annotations

import math

from fopd_cli.recipe import ChatTask
from fopd_cli.samples import Prompt
from fopd_cli.tasks.questions import Questions
from fopd_cli.tasks.sections import takes


class Chat(Questions):
    """Like `Questions`, without answers. Evaluations report the KL to the teacher."""

    @takes("chat", ChatTask)
    def __init__(self, options: ChatTask) -> None:
        super().__init__(options)

    def grade(self, prompt: Prompt, response: str) -> float:
        """nan: there is no grade."""
        return math.nan
