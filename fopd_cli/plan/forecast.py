"""What a recipe takes on a set of devices: memory, seconds, lag, hours, cost."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from fopd_cli.errors import UserError
from fopd_cli.plan import calibrate
from fopd_cli.plan.cost import Costs, by_arithmetic
from fopd_cli.plan.hardware import Hardware
from fopd_cli.plan.lengths import Lengths, log_normal, of_steps
from fopd_cli.plan.prompts import Prompts
from fopd_cli.plan.simulate import MEASURED, Outcome, simulate
from fopd_cli.recipe import Recipe, load_recipe
from fopd_cli.report.reading import Record, read
from fopd_cli.runtime.memory import model as memory
from fopd_cli.runtime.placement import Plan, place
from fopd_cli.runtime.placing import models as models_of
from fopd_cli.runtime.scheduling.prompts import EvalVersions

BOX_CORES = 64  # assumed for a machine with devices, other than this one


@dataclass(frozen=True)
class Run:
    """A run to calibrate with: what it measured, and the arithmetic for it."""

    path: Path
    costs: Costs
    guess: Costs
    steps: list[Record] = field(repr=False)
    batch: int
    cuda: bool

    @property
    def responses(self) -> Lengths:
        found = of_steps(self.steps, f"those of {self.path}")
        assert found is not None
        return found


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, besides the recipe."""

    hardware: Hardware
    models: memory.Models
    responses: Lengths
    prompts: Prompts
    run: Run | None = None
    here: bool = False  # on this very machine

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0)) if self.here or self.hardware.cpu else BOX_CORES

    def placed(self, recipe: Recipe) -> Plan:
        """Raises `UserError` if the recipe cannot be placed on the devices."""
        h = self.hardware
        fit = None if h.cpu else memory.Fit(recipe, self.models, h.nbytes)
        return place(recipe, h.count, self.cores, fit)

    def costs(self, recipe: Recipe, plan: Plan) -> Costs:
        args = (recipe, plan, self.models, self.hardware, self.responses, self.prompts.lengths)
        target = by_arithmetic(*args)
        if self.run is None:
            return target
        found = calibrate.carried_over(self.run.costs, self.run.guess, target)
        return replace(found, tools=calibrate.tool_seconds(self.run.steps))


@dataclass(frozen=True)
class Forecast:
    """The forecast of a recipe's run."""

    recipe: Recipe
    plan: Plan
    setting: Setting
    costs: Costs
    outcome: Outcome

    @property
    def workers(self) -> list[memory.Worker]:
        return memory.workers(self.recipe, self.plan, self.setting.models, self.setting.hardware.nbytes)

    @property
    def demands(self) -> list[memory.Demand]:
        """The peak demand on each device."""
        return memory.demands(self.plan, self.workers)

    @property
    def fits(self) -> bool:
        return memory.fits(self.demands, self.setting.hardware.nbytes)

    @property
    def evaluations(self) -> int:
        versions = EvalVersions(self.recipe.learner.steps, self.recipe.eval.every)
        return sum(v in versions for v in range(self.recipe.learner.steps + 1))

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, with evaluations and checkpoints, from when all engines are ready."""
        r = self.recipe
        training = self.outcome.total(r.learner.steps)
        every = r.checkpoint.every
        saves = 1 + (r.learner.steps // every if every else 0)
        return training + self.evaluations * self.evaluation + saves * self.costs.save

    @property
    def evaluation(self) -> float:
        """Seconds of one evaluation: all replicas sample the held-out prompts, which are judged as they come
        and then measured.
        """
        r, c = self.recipe, self.costs
        count = self.setting.prompts.held_out * r.eval.samples
        return sampling(r, self.plan, c, self.setting.responses, count) + count * (
            c.measuring.token * self._sample / len(self.plan.learners)
        )

    @property
    def _sample(self) -> float:
        return self.setting.prompts.lengths.mean + self.setting.responses.mean

    @property
    def tokens(self) -> float:
        """Tokens of all responses that are trained on."""
        return self.outcome.tokens * self.recipe.learner.steps

    def price(self, an_hour: float) -> float:
        """The price of all devices; `an_hour` is the price of one device."""
        return an_hour * self.setting.hardware.count * self.seconds / 3600


def forecast(
    recipe: Recipe, setting: Setting, plan: Plan | None = None, measured: int = MEASURED
) -> Forecast:
    """Raises `UserError` if the recipe cannot be placed."""
    plan = plan or setting.placed(recipe)
    costs = setting.costs(recipe, plan)
    outcome = simulate(
        recipe,
        plan,
        setting.models,
        costs,
        setting.responses,
        setting.prompts.lengths,
        setting.cores,
        setting.here,
        measured,
    )
    return Forecast(recipe, plan, setting, costs, outcome)


def guessed(recipe: Recipe) -> Lengths:
    """Responses about which nothing is known: on average half as long as allowed."""
    most = recipe.sampler.max_new_tokens
    return log_normal(max(1, most / 2), most, "a guess: half of sampler.max_new_tokens on average")


def calibrated(path: Path, recipe: Recipe, hardware: Hardware) -> Run:
    """Raises `UserError` if the run cannot tell what the recipe will take on these devices."""
    found = read(path)
    plan, cores = calibrate.placement(path)
    ran = load_recipe(path / "recipe.yaml")
    cuda = plan.mode != "cpu"
    if cuda == hardware.cpu:
        there = "CUDA devices" if cuda else "a CPU"
        raise UserError(
            f"--from: {path} ran on {there}, and the plan is for {hardware.name}; leave out --from, or "
            f"{'give --devices' if cuda else 'leave out --devices and --device'}"
        )
    engines = [(r.sampler.engine, [t.engine for t in r.teachers]) for r in (ran, recipe)]
    if engines[0] != engines[1]:
        raise UserError(
            f"--from: {path} ran with other engines ({_engines(ran)}) than the recipe asks for "
            f"({_engines(recipe)}); take a run with the same"
        )
    responses = of_steps(found.steps, str(path))
    spans = calibrate.spans(path, plan)
    if responses is None:
        raise UserError(f"--from: {path} holds no optimizer step in metrics.jsonl")
    batch = ran.learner.batch_samples
    prompt = measured_prompt(found.steps, batch)
    models = models_of(ran)
    lengths = log_normal(prompt, math.ceil(2 * prompt), "measured")
    guess = by_arithmetic(ran, plan, models, hardware, responses, lengths)
    own = calibrate.conductor_seconds(found.steps)
    costs = calibrate.measured(spans, guess, plan, calibrate.delays_of(ran), cores, own)
    return Run(path, costs, guess, found.steps, batch, cuda)


def measured_prompt(steps: list[Record], batch: int) -> float:
    """Mean tokens per sample of a run's prompts and tool outputs together."""
    found = [r["tokens"] / batch - r["response_length"] for r in steps]
    return max(1.0, sum(found) / len(found))


def _engines(recipe: Recipe) -> str:
    return ", ".join([recipe.sampler.engine, *(t.engine for t in recipe.teachers)])


def sampling(recipe: Recipe, plan: Plan, costs: Costs, responses: Lengths, samples: int) -> float:
    """Seconds for all replicas together to sample `samples` responses, by formula: waves of full batches, of
    which the last ends with a long response.
    """
    d = costs.decoding
    each = math.ceil(samples / len(plan.samplers))
    rows = max(1, min(d.rows, recipe.sampler.concurrency, each))
    a_pass = d.step + d.row * rows
    return a_pass * (each * responses.mean / rows + (responses.most - responses.mean) / 2)
