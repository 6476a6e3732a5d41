"""MFU by role and the learner's gaps, from spans."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_placement import recipe, shapes

from fopd_cli.runtime.crew.messages import Span
from fopd_cli.runtime.journal.utilization import Utilization
from fopd_cli.runtime.memory.model import Models
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.time_model import at_peak

PEAK = 989e12


def test_a_role_is_measured_by_its_tokens_over_the_seconds_in_which_it_computed() -> None:
    """Roles without a known peak have no MFU; idle time between spans does not count."""
    found = Utilization({"learner-0": 1e-3, "teacher-0": 1e-4, "teacher-1": 1e-4})
    found.worked("learner-0", Span("train", 100.0, 102.0, {"tokens": 1000}))
    found.worked("learner-0-publisher", Span("publish", 102.0, 102.5))
    found.worked("learner-0", Span("train", 110.0, 112.0, {"tokens": 500}))
    found.worked("teacher-0", Span("score", 100.0, 101.0, {"tokens": 2000}))
    found.worked("teacher-1", Span("score", 100.0, 101.0, {"tokens": 4000}))
    found.worked("sampler-0", Span("generate", 0.0, 9.0, {"rows": 5, "prompt_tokens": 7, "tokens": 4}))
    first = found.step()
    assert first["mfu"] == {"learner": pytest.approx(1.5 / 4), "teacher": pytest.approx(0.6 / 2)}
    assert first["gap_seconds"] == pytest.approx(8.0)
    assert found.step() == {"gap_seconds": 0.0}


def test_a_sampler_computes_its_prompts_and_a_token_of_each_row_in_each_pass() -> None:
    found = Utilization({"sampler-0": 1e-2})
    found.worked("sampler-0", Span("generate", 0.0, 2.0, {"rows": 5, "prompt_tokens": 7, "tokens": 4}))
    assert found.step()["mfu"] == {"sampler": pytest.approx(12e-2 / 2)}


def test_the_peak_is_that_of_all_devices_of_a_worker(tmp_path: Path) -> None:
    """The first of three learners stands for all; recomputation in checkpointing is not model FLOP."""
    split = {"mode": "partition", "sampler": 4, "teacher": 1, "learner": 3}
    wanted = recipe(tmp_path, "sampler.engine=vllm", "sampler.vllm.tensor_parallel=2", **split)
    models = Models(shapes(1.5), {"teacher": shapes(7, 4096, 40)}, 576, 576)
    found = at_peak(wanted, place(wanted, 8, 64), models, PEAK)
    student, teacher = models.student.active, models.teachers["teacher"]
    assert found == {
        "learner-0": pytest.approx((6 * student + 2 * teacher.head) / (3 * PEAK)),
        "teacher-0": pytest.approx(2 * teacher.active / PEAK),
        "sampler-0": pytest.approx(2 * student / (2 * PEAK)),
        "sampler-1": pytest.approx(2 * student / (2 * PEAK)),
    }
    assert at_peak(recipe(tmp_path), place(recipe(tmp_path), 0, 8), models, PEAK) == {}
