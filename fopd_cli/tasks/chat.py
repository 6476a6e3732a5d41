"""Questions without an answer that could be graded: the teacher's distribution is all that is learnt from,
and the measure.
"""

from __future__ import annotations

import math

from fopd_cli.samples import Prompt
from fopd_cli.tasks.questions import Questions


class Chat(Questions):
    """As `Questions`, without an answer. Evaluations report the KL to the teacher."""

    def grade(self, prompt: Prompt, response: str) -> float:
        """nan: there is no grade."""
        return math.nan
