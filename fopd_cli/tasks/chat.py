"""Questions without an answer that could be graded: the teacher's distribution is all that is learnt from,
and the measure.
"""

from __future__ import annotations

import math
from typing import Any

from fopd_cli.samples import Prompt
from fopd_cli.tasks.questions import Questions


class Chat(Questions):
    """As `Questions`, without an answer. Evaluations report the KL to the teacher."""

    def __init__(
        self, train: str, eval: str | None = None, question: str = "messages", **options: Any
    ) -> None:
        super().__init__(train, eval, question, answer=None, **options)

    def grade(self, prompt: Prompt, response: str) -> float:
        """nan: there is no grade."""
        return math.nan
