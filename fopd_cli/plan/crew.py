"""The in-process crew with engines that slow each other down. How long a command takes depends on what else
runs at the time, so its end is not known in advance.

    a sampler runs all its requests at once, a pass at a time, and stops for prompts and new weights;
    the other engines do one command after another.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fopd_cli.plan.contention import Contention
from fopd_cli.plan.cost import Call, Costs, Decoding
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.crew import Engine
from fopd_cli.runtime.crew.inprocess import STUCK, Engines, Virtual
from fopd_cli.runtime.scheduling.tickets import Role
from fopd_cli.samples import Rollout

NOTHING = 1e-9  # seconds, or tokens


class Enough(Exception):
    """All optimizer steps that were asked for are done."""


@dataclass
class _Job:
    """Seconds of work at full speed, then seconds of waiting, which nothing slows down."""

    work: float
    wait: float
    answers: Sequence[m.Answer] = ()


@dataclass
class _InTurn:
    """An engine that does one job after another."""

    jobs: deque[_Job] = field(default_factory=deque)

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    @property
    def asleep(self) -> bool:
        return bool(self.jobs) and self.jobs[0].work <= NOTHING

    def left(self, rate: float) -> float:
        """Seconds until the current job changes from work to waiting, or ends."""
        job = self.jobs[0]
        return job.wait if self.asleep else job.work / rate

    def pass_time(self, seconds: float, rate: float) -> Sequence[m.Answer]:
        """Advance by at most `left`; returns the answers of a finished job."""
        job = self.jobs[0]
        if self.asleep:
            job.wait -= seconds
        else:
            job.work -= seconds * rate
        if job.work > NOTHING or job.wait > NOTHING:
            return ()
        self.jobs.popleft()
        return job.answers


@dataclass(order=True)
class _Row:
    """A running request. It ends once `end` tokens have been sampled in each row since the run's start."""

    end: float
    order: int
    held: float = field(compare=False)  # its prompt's tokens, minus those sampled in each row before it began
    answer: m.Sampled = field(compare=False)


class _Sampler:
    """A replica. Responses end on a grid of `grid` tokens, so that several end at the same moment. If one
    simulated request stands for more requests than can run at once, they run in `waves`.
    """

    asleep = False

    def __init__(self, costs: Decoding, many: int, waves: float, grid: int) -> None:
        self.costs, self.many, self.waves, self.grid = costs, many, waves, grid
        self.stops = _InTurn()  # prompts and new weights, before the next pass
        self.rows: list[_Row] = []  # a heap
        self.queue: deque[m.Sampled] = deque()
        self.sampled = 0.0  # tokens in each row since the start
        self._order = itertools.count()

    @property
    def busy(self) -> bool:
        return self.stops.busy or bool(self.rows)

    def take(self, answers: Sequence[m.Answer]) -> None:
        """Queue new requests, given as the responses that they will get."""
        for answer in answers:
            assert isinstance(answer, m.Sampled)
            self.queue.append(answer)
        prompts = sum(r.prompt_length for a in answers if isinstance(a, m.Sampled) for r in a.rollouts)
        seconds = self.costs.exchange + self.costs.prompt_token * self.many * prompts
        self.stops.jobs.append(_Job(seconds, 0.0))
        self._fill()

    def load(self, answers: Sequence[m.Answer], recompute: bool) -> None:
        held = sum(row.held + self.sampled for row in self.rows) if recompute else 0.0
        seconds = self.costs.load + self.costs.prompt_token * self.many * held
        self.stops.jobs.append(_Job(seconds, 0.0, answers))

    def abort(self) -> None:
        self.rows, self.queue, self.stops = [], deque(), _InTurn()

    def _fill(self) -> None:
        most = max(1, self.costs.rows // self.many)
        if not self.queue or (self.rows and (most - len(self.rows)) * self.many < self.costs.free):
            return
        if self.rows and self.costs.join:
            self.stops.jobs.append(_Job(self.costs.join, 0.0))
        while self.queue and len(self.rows) < most:
            answer = self.queue.popleft()
            (rollout,) = answer.rollouts
            last = self.sampled + rollout.response_length
            end = max(self.grid * round(last / self.grid), self.sampled + 1)
            row = _Row(end, next(self._order), rollout.prompt_length - self.sampled, answer)
            heapq.heappush(self.rows, row)

    def _a_pass(self) -> float:
        return self.waves * self.costs.step + self.costs.row * self.many * len(self.rows)

    def left(self, rate: float) -> float:
        if self.stops.busy:
            return self.stops.left(rate)
        return (self.rows[0].end - self.sampled) * self._a_pass() / rate

    def pass_time(self, seconds: float, rate: float) -> Sequence[m.Answer]:
        if self.stops.busy:
            return self.stops.pass_time(seconds, rate)
        took = self._a_pass()
        self.sampled = self.sampled + seconds * rate / took if took > NOTHING else self.rows[0].end
        found = []
        while self.rows and self.rows[0].end <= self.sampled + 1e-6:
            found.append(heapq.heappop(self.rows).answer)
        if found and self.costs.exchange:
            self.stops.jobs.append(_Job(self.costs.exchange, 0.0))
        self._fill()
        return found


class Shared(Virtual):
    """See above. `many`: how many samples each simulated one stands for. `delays`: each teacher's seconds per
    sample. The crew raises `Enough` after `steps` optimizer steps.
    """

    def __init__(
        self,
        engines: Engines,
        costs: Costs,
        contention: Contention,
        *,
        delays: Sequence[float],
        recompute: bool,
        many: int,
        waves: float,
        grid: int,
        steps: int,
    ) -> None:
        super().__init__(engines)
        self.prices, self.contention, self.delays = costs, contention, delays
        self.recompute, self.many, self.steps = recompute, many, steps
        self._at: dict[Engine, _InTurn | _Sampler] = {
            engine: _Sampler(costs.decoding, many, waves, grid) if engine.role == "sampler" else _InTurn()
            for engine in contention.places
        }
        self._at[Engine("grader")] = _InTurn()
        self.busy: dict[Engine, float] = defaultdict(float)  # seconds
        self.marks: list[tuple[float, dict[Engine, float]]] = []  # each step's end, and `busy` then

    # ---- commands ------------------------------------------------------------------------------------------

    def send(self, engine: Engine, command: m.Command) -> None:
        answers, place = self.engines.do(engine, command), self._at[engine]
        if isinstance(place, _Sampler):
            match command:
                case m.GenerateCommand():
                    place.take(answers)
                case m.LoadCommand():
                    place.load(answers, self.recompute)
                case _:
                    place.abort()
            return
        work, wait = self._takes(engine, command)
        place.jobs.append(_Job(work, wait, answers))

    def _takes(self, engine: Engine, command: m.Command) -> tuple[float, float]:
        """Seconds of work, and seconds of waiting."""
        match command:
            case m.ScoreCommand(rollouts):
                share = self._share(engine, [len(r.judged.token_ids) for r in rollouts])
                samples = math.ceil(len(rollouts) * self.many / self._ranks(engine))
                work = self._call(self.prices.scoring[engine.index], share)
                return work, self.delays[engine.index] * samples
            case m.TrainCommand(_, rollouts):
                return self._call(self.prices.training, self._of(engine, rollouts)), 0.0
            case m.EvaluateCommand(rollouts):
                return self._call(self.prices.measuring, self._of(engine, rollouts)), 0.0
            case m.GradeCommand(items):
                return self.prices.grade * len(items) * self.many, 0.0
            case _:
                return 0.0, 0.0

    def _call(self, costs: Call, tokens: float) -> float:
        return costs.seconds(tokens * self.many)

    def _of(self, engine: Engine, rollouts: Sequence[Rollout]) -> float:
        return self._share(engine, [len(r.token_ids) for r in rollouts])

    def _ranks(self, engine: Engine) -> int:
        return self.contention.places[engine].processes

    def _share(self, engine: Engine, lengths: Sequence[int]) -> float:
        """Tokens of the rank with the most: shares are balanced, but a sample is never split."""
        return max(sum(lengths) / self._ranks(engine), max(lengths) / self.many)

    def lease(self, sleeper: Role | None, waker: Role) -> None:
        self._happens(self.now + self.prices.turn, Engine(waker), m.Leased(waker))

    # ---- time ----------------------------------------------------------------------------------------------

    def receive(self) -> Iterator[tuple[Engine, m.Event]]:
        """All events of the next moment. Then the conductor does its own work while engines go on."""
        while not self._events or self._events[0][0] > self.now:
            self._advance(math.inf)
        work = 0.0
        for engine, event in self._happened():
            yield engine, event
            work += self.prices.message
            if isinstance(event, m.Sampled):
                work += self.many * self.prices.sample * len(event.rollouts)
            if isinstance(event, m.Trained):
                work += self.prices.bookkeeping
                self.marks.append((self.now, dict(self.busy)))
                if len(self.marks) == self.steps:
                    raise Enough
        until = self.now + work
        while self.now < until:
            self._advance(until, others=1)

    def _advance(self, until: float, others: int = 0) -> None:
        """Advance to the next change, but at most to `until`. `others`: threads of the conductor."""
        working = {e: place for e, place in self._at.items() if place.busy}
        asleep = [e for e, place in working.items() if place.asleep]
        rates = self.contention.rates(working, asleep, others)
        left = {e: place.left(rates.get(e, 1.0)) for e, place in working.items()}
        soonest = self._events[0][0] if self._events and self._events[0][0] > self.now else math.inf
        end = min(until, soonest, self.now + min(left.values(), default=math.inf))
        if end == math.inf:
            raise RuntimeError(STUCK)
        seconds = end - self.now
        self.now = end
        for engine, place in working.items():
            self.busy[engine] += seconds
            done = place.pass_time(min(seconds, left[engine]), rates.get(engine, 1.0))
            sampled = [r for answer in done if isinstance(answer, m.Sampled) for r in answer.rollouts]
            if sampled:  # in one message, as a sampler sends them
                self._happens(end + self.prices.tools, engine, m.Sampled(sampled, [], 0))
            for answer in done:
                if isinstance(answer, m.Published):
                    self._happens(self._trained + self.prices.publish, engine, answer)
                elif not isinstance(answer, m.Sampled):
                    self._happens(end, engine, answer)
