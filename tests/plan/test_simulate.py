"""The schedule on the virtual clock against what any pipeline must take: nothing here is timed for real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import ROOT

from fopd_cli.plan.contention import Contention, Place, places
from fopd_cli.plan.cost import Call, Costs, Decoding
from fopd_cli.plan.lengths import Lengths, log_normal
from fopd_cli.plan.simulate import Outcome, simulate
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.crew.crew import GRADER, LEARNER, sampler, teacher
from fopd_cli.runtime.memory.model import Models
from fopd_cli.runtime.placement import place
from fopd_cli.runtime.placing import models

BATCH, TOKENS = 8, 40
SMALL = (
    f"learner.batch_samples={BATCH}",
    f"sampler.concurrency={BATCH}",
    f"teacher.batch_samples={BATCH}",
    "freshness.max_drift=null",
    "freshness.xi=0",
    "learner.steps=100",
)
EVEN, SHORT = Lengths((TOKENS,), "even"), Lengths((10,), "prompts")


@pytest.fixture(scope="module")
def tiny() -> Models:
    return models(load_recipe(ROOT / "recipes" / "quickstart.yaml"), 10)


def costs(sample: float, judge: float, learn: float, **other: Any) -> Costs:
    """Seconds of a batch of even lengths in each role."""
    decoding = Decoding(step=sample / TOKENS, row=0.0, prompt_token=0.0, load=0.0, rows=10**6)
    free = {"publish": 0.0, "measuring": Call(0.0, 0.0), "bookkeeping": 0.0, "message": 0.0, "sample": 0.0}
    return Costs(decoding, (Call(judge, 0.0),), Call(learn, 0.0), **{**free, **other})


def outcome(
    tiny: Models, lag: int, found: Costs, *settings: str, lengths: Lengths = EVEN, devices: int = 3
) -> Outcome:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [*SMALL, f"schedule.max_lag={lag}", *settings])
    return simulate(recipe, place(recipe, devices), tiny, found, lengths, SHORT, cores=4)


STAGES = [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0), (2.0, 3.0, 1.0), (5.0, 0.0, 0.0), (0.0, 0.0, 5.0)]


@pytest.mark.parametrize("stages", STAGES)
def test_without_lag_a_step_is_the_sum_of_its_stages(
    tiny: Models, stages: tuple[float, float, float]
) -> None:
    found = outcome(tiny, 0, costs(*stages))
    assert found.seconds == pytest.approx(sum(stages), rel=1e-6)
    assert (found.lag_mean, found.lag_max) == (0, 0)
    shares = dict(zip(("sampler", "teacher", "learner"), stages, strict=True))
    assert found.busy == pytest.approx({role: s / sum(stages) for role, s in shares.items()})


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("inflight", ["keep", "wait"])
@pytest.mark.parametrize("lag", [0, 1, 2, 4])
def test_a_step_is_its_longest_stage_or_its_share_of_the_way(
    tiny: Models, stages: tuple[float, float, float], inflight: str, lag: int
) -> None:
    """No stage does two steps at once, and no more than lag + 1 steps are under way."""
    found = outcome(tiny, lag, costs(*stages), f"schedule.inflight={inflight}")
    assert found.seconds == pytest.approx(max(*stages, sum(stages) / (lag + 1)), rel=1e-6)
    assert found.lag_max <= lag


def test_a_lag_without_bound_is_simulated_in_no_more_time(tiny: Models) -> None:
    """A learner a thousand times slower than the samplers, which nothing holds back."""
    assert outcome(tiny, 10**6, costs(0.001, 0.001, 1.0)).seconds == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("lag", [1, 2, 4, 8])
def test_a_slow_learner_gets_samples_as_old_as_the_recipe_allows(tiny: Models, lag: int) -> None:
    assert outcome(tiny, lag, costs(0.1, 0.1, 5.0)).lag_max == lag


def test_a_fixed_lag_is_what_every_sample_has(tiny: Models) -> None:
    found = outcome(tiny, 4, costs(1.0, 2.0, 3.0), "schedule.lag=2")
    assert (found.lag_mean, found.lag_max) == (2, 2)


def test_a_step_without_lag_waits_for_its_longest_response(tiny: Models) -> None:
    uneven = Lengths((10, 20, 40), "uneven")
    found = outcome(tiny, 0, costs(4.0, 0.0, 0.0), lengths=uneven)
    assert found.seconds == pytest.approx(4.0, rel=1e-6)
    assert found.tokens == pytest.approx(BATCH * uneven.mean, rel=0.1)


@pytest.mark.parametrize("publish", [0.25, 0.75])
def test_delays_and_the_longer_of_publication_and_bookkeeping_count(tiny: Models, publish: float) -> None:
    found = costs(1.0, 1.0, 1.0, publish=publish, bookkeeping=0.5)
    slow = outcome(tiny, 0, found, "teacher.delay_ms=125")
    assert slow.seconds == pytest.approx(3 + max(publish, 0.5) + BATCH * 0.125, rel=1e-6)


@pytest.mark.parametrize("publish", [0.5, 4.0])
def test_a_publication_goes_on_beside_the_next_step_which_waits_for_its_end(
    tiny: Models, publish: float
) -> None:
    found = outcome(tiny, 4, costs(0.1, 0.1, 3.0, publish=publish))
    assert found.seconds == pytest.approx(max(3.0, publish), rel=1e-6)


def test_ranks_share_the_tokens_and_replicas_the_samples(tiny: Models) -> None:
    """Twice the devices of each role, twice the speed, where all of a call's costs are its tokens'."""
    tokens = BATCH * (TOKENS + 10)
    found = costs(4.0, 0.0, 0.0)
    found = replace(found, scoring=(Call(0.0, 2.0 / tokens),), training=Call(0.0, 3.0 / tokens))
    split = "placement={mode: partition, sampler: 2, teacher: 2, learner: 2}"
    half = f"sampler.concurrency={BATCH // 2}"
    one = outcome(tiny, 0, found, half)
    two = outcome(tiny, 0, found, split, half, devices=6)
    assert one.seconds == pytest.approx(2 * 4 + 2 + 3, rel=1e-6)
    assert two.seconds == pytest.approx(4 + 1 + 1.5, rel=1e-6)


def test_many_samples_are_simulated_by_few(tiny: Models) -> None:
    """A step of 4,000 samples: a pass of all of them, and calls of 500 each."""
    found = costs(0.0, 0.5, 0.0)
    found = replace(found, decoding=replace(found.decoding, step=0.01, row=1e-5))
    large = [f"{key}=4000" for key in ("learner.batch_samples", "sampler.concurrency")]
    step = outcome(tiny, 0, found, *large, "teacher.batch_samples=500").seconds
    assert step == pytest.approx(TOKENS * (0.01 + 4000 * 1e-5) + 8 * 0.5, rel=0.02)


def test_a_cache_that_holds_few_rows_makes_the_others_wait(tiny: Models) -> None:
    found = costs(4.0, 0.0, 0.0)
    few = replace(found, decoding=replace(found.decoding, rows=BATCH // 4))
    assert outcome(tiny, 0, few).seconds == pytest.approx(4 * 4.0, rel=1e-6)


@pytest.mark.parametrize("lag", [0, 2])
def test_roles_on_one_device_take_as_long_as_all_together(tiny: Models, lag: int) -> None:
    found = outcome(
        tiny, lag, costs(1.0, 2.0, 3.0, turn=0.0), "placement.mode=timeslice", lengths=EVEN, devices=1
    )
    assert found.seconds == pytest.approx(6.0, rel=1e-6)


@pytest.mark.parametrize("measured", [1, 8])
def test_in_turns_a_round_of_steps_is_sampled_at_once(tiny: Models, measured: int) -> None:
    """With places for three batches and a lag of 2; whole rounds are timed, however few are asked for."""
    settings = [*SMALL, "schedule.max_lag=2", f"sampler.concurrency={3 * BATCH}", "placement.mode=timeslice"]
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", settings)
    found = simulate(
        recipe, place(recipe, 1), tiny, costs(9.0, 1.0, 2.0), EVEN, SHORT, cores=4, measured=measured
    )
    assert found.seconds == pytest.approx(9.0 / 3 + 1.0 + 2.0, rel=1e-6)


def test_turns_cost_what_sleeping_and_waking_costs(tiny: Models) -> None:
    found = outcome(tiny, 0, costs(1.0, 2.0, 3.0, turn=0.5), "placement.mode=timeslice", devices=1)
    assert found.seconds == pytest.approx(6.0 + 3 * 0.5, rel=1e-6)


def test_uneven_lengths_cost_less_where_a_lag_lets_stragglers_be_overtaken(tiny: Models) -> None:
    uneven = log_normal(TOKENS, 10 * TOKENS, "long tail")
    settings = ("sampler.max_new_tokens=400", "schedule.inflight=keep")
    longest, with_lag = (
        outcome(tiny, lag, costs(4.0, 0.0, 0.5), *settings, lengths=uneven).seconds for lag in (0, 4)
    )
    assert with_lag < 0.7 * longest


# ---- who shares what ---------------------------------------------------------------------------------------


def at(threads: int | None, devices: frozenset[int] = frozenset()) -> Place:
    return Place(devices, threads, 1)


def test_devices_are_shared_equally_and_others_are_left_alone() -> None:
    both, own = frozenset({0}), frozenset({1})
    found = Contention({LEARNER: at(1, both), teacher(0): at(1, both), sampler(0): at(1, own)}, 4)
    assert found.rates([LEARNER, teacher(0), sampler(0)]) == {LEARNER: 0.5, teacher(0): 0.5, sampler(0): 1}
    assert found.rates([LEARNER, sampler(0), GRADER]) == {LEARNER: 1, sampler(0): 1}


def test_cores_by_need_are_divided_among_those_that_compute() -> None:
    where = {LEARNER: at(None), teacher(0): at(None), sampler(0): at(None)}
    assert Contention(where, 2).rates([LEARNER, sampler(0)]) == {LEARNER: 0.5, sampler(0): 0.5}
    third = Contention(where, 3, spread=0.5).rates(list(where))
    assert third[LEARNER] == pytest.approx((1 / 3) ** 0.5)
    helped_by_nothing = Contention(where, 2, spread=0.0).rates([LEARNER, sampler(0)])
    assert helped_by_nothing == {LEARNER: 1, sampler(0): 1}


def test_fixed_threads_slow_each_other_down_only_where_cores_are_short() -> None:
    found = Contention({LEARNER: at(1), teacher(0): at(1), sampler(0): at(1)}, 2, spread=0.0)
    alone = found.rates([LEARNER])[LEARNER]
    assert found.rates([LEARNER, sampler(0)])[LEARNER] == alone
    assert found.rates([LEARNER, sampler(0), teacher(0)])[LEARNER] == pytest.approx(alone * 2 / 3)
    waiting = found.rates([LEARNER, sampler(0), teacher(0)], asleep=[teacher(0)])
    assert waiting[LEARNER] == alone


def test_places_are_those_of_the_placement() -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    found = places(place(recipe, 8))
    assert found[LEARNER].devices == {6, 7}
    assert found[LEARNER].processes == 2
    assert found[sampler(3)].devices == {3}
    assert len([e for e in found if e.role == "sampler"]) == 4
