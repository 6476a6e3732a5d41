"""What may start when: admission, versions, lag, back-pressure, refresh, evaluation. A pure state machine.

It knows no processes, no tensors and no clock. The conductor tells it what happened (`on_*`) and asks what to
start (`actions`); tests do the same on a virtual clock.

**Lag is bounded by admission.** Let B be the batch, D max_lag, t the optimizer steps done, v the version
that a sampler holds, n the samples admitted and not yet consumed. A sampler at v may be given another sample
only while

    t B + n < (D + v + 1) B                                                                    (admission)

A sample admitted at v has the deadline v + D: it must be consumed at or before optimizer step v + D. By
(admission), the samples with deadline <= s never number more than (s - t + 1) B, that is, what steps t .. s
consume. The batch of step t takes the ready samples of earliest deadline, and starts only if afterwards, for
every s > t,

    those left with deadline <= s number at most (s - t) B                                     (feasibility)

If not, it waits for the stragglers that it lacks. So no sample is ever older than D at consumption, no
finished sample is ever thrown away for its age, and a straggler can be overtaken only as long as it still
makes its deadline.

**No race among equals.** Of the samples that were admitted at one version and are not consumed, only the
first B may be chosen. In the long run B samples are admitted at each version, so this forbids nothing. But at
the start of a run, after a refresh, and where sampling begins to run farther ahead, several batches start at
once. Whichever samples ended first would make up the first batch, and these are the shortest: see
docs/real-pair.md for what that does. The B most urgent samples can always be chosen, so that a step waits for
no more than these.

**Less ahead.** `ahead` steps, at most D, is what (admission) uses in D's place; the conductor sets it by the
measured drift (`freshness/ahead.py`). Deadlines stay v + D: admitting less keeps the bound all the more.

**Fixed lag** (`lag = k`, for studies): window j (samples jB .. jB+B-1) is sampled only by version
max(0, j - k) and consumed at step j. A sampler moves to v + 1 only when window v + k is sampled, and step t
starts only when all samplers hold version t.

**Windows.** At max_lag 0 and under a fixed lag two runs must compute the same bits. So samples are cut by
number into the batches that consume them (`_windows`), and every group of a sampler or teacher is within one:
`concurrency` or `score_batch` samples in a row, whatever the order of arrival. Groups are scored in the order
in which they are consumed, held-out ones first, because the learner waits for them. A group whose targets do
not fit takes room from the last groups, which are scored again later, as whole groups.

**Resuming.** `state_dict` keeps whole groups or nothing: a group that is half sampled is planned again, one
that is half scored is scored again. Under a fixed lag the rest of the current window is still sampled by
version `step - 1` (`resume_version`), whose weights the checkpoint holds for that.

**Two weight slots.** Version t + 1 is written over version t - 1, once step t is done. Step t may start while
version t is still being published, but only when no sampler is still loading something older; and from the
end of a step until its version is published, no sampler is told to load anything.

**Re-execution.** Before a step, the calls of its batch's oldest samples with a lag of at least
`reexecute_min_lag`, at most `reexecutions` of them, are executed again, once each; samples whose context
changed are scored again. Where new labels replace the first ones, the step waits for them, so that a label is
of the step's own time. Where only drift is measured (`reexecute_ahead`), that happens while the learner is
still at the previous step, as of that step, and the next step waits only for the rest. Samples that a lost
teacher was scoring again are scored on their first context and then executed again.

**Lost engines.** What a lost sampler was generating, or a lost teacher scoring, goes back one state, and is
redone by any engine with room: a living replica, or the same one when it is back. A sampler that is back, or
awake after its sleep on a time-sliced box, holds no weights and loads the newest before anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fopd_cli.runtime.scheduling.tickets import (
    Action,
    Evaluate,
    Generate,
    Lease,
    Load,
    Reexecute,
    Role,
    ScheduleConfig,
    Score,
    State,
    Ticket,
    Train,
)
from fopd_cli.samples import SampleId


def _cut(tickets: list[Ticket], size: int) -> list[list[Ticket]]:
    return [tickets[i : i + size] for i in range(0, len(tickets), size)]


@dataclass
class _Replica:
    loaded: int = -1
    loading: int | None = None
    stale: bool = False  # a refresh wants the newest weights before anything else
    running: set[int] = field(default_factory=set)
    up: bool = True
    blank: bool = True  # it holds no weights: just started, or slept


@dataclass
class _Teacher:
    scoring: int = 0  # calls under way
    up: bool = True


class Schedule:
    """See the module's docstring. `prompt_stream(n)` is the n-th training draw, `eval_ids` the held-out ones.

    `teacher_of(sample)` is the number of the teacher that judges it. `reserve(keys)` takes memory for the
    targets of all these samples, or for none and returns False; `release(key)` gives it back.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        prompt_stream: Callable[[int], SampleId],
        eval_ids: Iterable[SampleId],
        reserve: Callable[[tuple[int, ...]], bool] = lambda keys: True,
        release: Callable[[int], None] = lambda key: None,
        teacher_of: Callable[[SampleId], int] = lambda sample: 0,
    ) -> None:
        self.config = config
        self.prompt_stream = prompt_stream
        self.eval_ids = list(eval_ids)
        self.reserve, self.release, self.teacher_of = reserve, release, teacher_of
        self.tickets: dict[int, Ticket] = {}
        self.retries: list[SampleId] = []  # dropped by a refresh, to be drawn again before new prompts
        self.cursor = 0  # next number of the prompt stream
        self.next_key = 0
        self.step = 0  # optimizer steps done == version of the student
        self.published = -1  # the newest version in a slot
        self.consumed = 0  # samples consumed by those steps
        self.replicas = [_Replica() for _ in range(config.replicas)]
        self.learner_busy = True  # until `on_learner_ready`
        self.teachers = [_Teacher() for _ in config.score_batch]
        self.counts: Counter[str] = Counter()  # drawn, trained, gated, refreshed
        self.evaluated: set[int] = set()
        self.lease: Role | None = None
        self._switching = False
        self.refreshes = 0
        self.ahead = config.bound  # steps that sampling may run ahead
        self.reexecuted_now = 0  # for the next step
        self.paused = (
            False  # nothing new starts (Ctrl-C); a time-sliced box goes back to the learner, to be saved
        )

    # ---- what happened -------------------------------------------------------------------------------------

    def on_learner_ready(self) -> None:
        """The learner has published version `step` and can train."""
        self.published = self.step
        self.learner_busy = False

    def on_loaded(self, replica: int, version: int) -> None:
        r = self.replicas[replica]
        if r.loading != version:
            raise RuntimeError(f"sampler {replica} loaded version {version}, expected {r.loading}")
        r.loaded, r.loading, r.blank = version, None, False
        r.stale = r.stale and version < self.step

    def on_sampled(self, replica: int, key: int, oldest_version: int) -> bool:
        """Returns False for a sample that a refresh dropped, or a pause abandoned, meanwhile."""
        self.replicas[replica].running.discard(key)
        ticket = self.tickets.get(key)
        if ticket is None or ticket.state is not State.SAMPLING:
            return False
        if oldest_version < ticket.version:
            raise RuntimeError(
                f"sample {ticket.sample} holds tokens of version {oldest_version} < {ticket.version}"
            )
        ticket.state, ticket.version = State.SAMPLED, oldest_version
        return True

    def on_graded(self, key: int) -> None:
        if key in self.tickets:
            self.tickets[key].graded = True

    def on_scored(self, teacher: int, keys: Iterable[int]) -> list[int]:
        """Returns the keys that a refresh dropped meanwhile."""
        self.teachers[teacher].scoring -= 1
        dropped = []
        for key in keys:
            if key in self.tickets:
                self.tickets[key].state = State.SCORED
            else:
                dropped.append(key)
        return dropped

    def on_reexecuted(self, key: int, changed: bool) -> None:
        """A sample's calls were executed again; one that was dropped meanwhile is ignored."""
        ticket = self.tickets.get(key)
        if ticket is not None and ticket.state is State.REEXECUTING:
            ticket.state, ticket.reexecuted = State.REEXECUTED if changed else State.SCORED, True

    def on_environment_lost(self) -> None:
        """Running re-executions get no answer: their samples count as scored."""
        for ticket in self.tickets.values():
            if ticket.state is State.REEXECUTING:
                ticket.state = State.SCORED
                self.reexecuted_now -= 1

    def on_trained(self, step: int, outcomes: dict[int, Literal["trained", "gated"]]) -> None:
        """The optimizer step is done, and its version is being published; `outcomes` names every sample of
        the batch.
        """
        if step != self.step:
            raise RuntimeError(f"the learner finished step {step}, expected {self.step}")
        for key, outcome in outcomes.items():
            del self.tickets[key]
            self.counts[outcome] += 1
        self.consumed += len(outcomes)
        self.step += 1
        self.learner_busy = False

    def on_published(self, version: int) -> None:
        """The newest version is in its slot; samplers may load it."""
        if version != self.step:
            raise RuntimeError(f"version {version} was published, expected {self.step}")
        self.published = version

    def on_evaluated(self, version: int, keys: Iterable[int]) -> bool:
        """Some held-out samples are evaluated; returns whether the evaluation at `version` is complete."""
        for key in keys:
            del self.tickets[key]
        self.learner_busy = False
        complete = not any(t.evaluation for t in self.tickets.values())
        if complete:
            self.evaluated.add(version)
        return complete

    def on_leased(self, role: Role) -> None:
        if self.lease == "sampler":
            for replica in self.replicas:
                replica.blank = True
        self.lease, self._switching = role, False

    def on_sampler_lost(self, index: int) -> None:
        """A replica died or was stopped: its unfinished samples are planned again."""
        replica = self.replicas[index]
        self._plan_again(replica.running)
        replica.up, replica.blank, replica.loading = False, True, None

    def on_sampler_back(self, index: int) -> None:
        self.replicas[index].up = True

    def on_teacher_lost(self, index: int) -> list[int]:
        """A teacher died or was stopped; returns the keys that it was scoring, whose reservations must be
        released.
        """
        self.teachers[index] = _Teacher(up=False)
        lost = [t for t in self.tickets.values() if t.state is State.SCORING and t.teacher == index]
        for ticket in lost:
            self.reexecuted_now -= ticket.reexecuted
            ticket.state, ticket.reexecuted = State.SAMPLED, False
        return [t.key for t in lost]

    def on_teacher_back(self, index: int) -> None:
        self.teachers[index].up = True

    def refresh(self) -> dict[int, SampleId]:
        """Drop every training sample that is not being trained on; returns them by key. Their prompts are
        drawn again.

        Where two runs must agree, all samples that could have been started by now count as drawn: which ones
        really were depends on the clock.
        """
        if self.config.deterministic:
            while self.consumed + sum(map(len, self._windows())) < self._bound(self.step - 1):
                self._count_drawn(self.tickets[self._add_next()])
        dropped = {
            k: t.sample for k, t in self.tickets.items() if not t.evaluation and t.state is not State.TRAINING
        }
        for key in sorted(dropped):
            del self.tickets[key]
            self.counts["refreshed"] += 1
            self.retries.append(replace(dropped[key], attempt=dropped[key].attempt + 1))
        for replica in self.replicas:
            replica.running -= dropped.keys()
            replica.stale = True
        self.refreshes += 1
        return dropped

    def abandon(self) -> None:
        """Running generations are stopped (the conductor aborts them); their samples are planned again."""
        for replica in self.replicas:
            self._plan_again(replica.running)

    def _plan_again(self, running: set[int]) -> None:
        for key in running & self.tickets.keys():
            self.tickets[key].state = State.PLANNED
        running.clear()

    # ---- what to start -------------------------------------------------------------------------------------
    # `_plan_*` only look; `_start_*` change the state and return the actions for the conductor to carry out.

    @property
    def done(self) -> bool:
        at_end = self.step == self.config.steps and self._eval_due() is None
        return at_end and not self.learner_busy and not self.publishing

    @property
    def publishing(self) -> bool:
        """Whether the newest version is still on its way to its slot."""
        return self.published < self.step

    @property
    def in_flight(self) -> int:
        """Drawn and not yet counted as anything else."""
        return sum(t.drawn and not t.evaluation for t in self.tickets.values())

    def actions(self) -> list[Action]:
        """Everything that can start now; the state already counts it as started."""
        if self._switching:
            return []
        if self.paused:
            return self._pass_lease() if self.config.exclusive and not self._busy() else []
        self._start_evaluation()
        out: list[Action] = []
        out += self._start_reexecutions()
        if self._may("learner"):
            out += self._start_learner()
        if self._may("teacher"):
            out += self._start_teacher()
        if self._may("sampler"):
            out += self._start_samplers()
        if self.config.exclusive and not out and not self._busy():
            out += self._pass_lease()
        return out

    def _may(self, role: Role) -> bool:
        return not self.config.exclusive or self.lease == role

    def _busy(self) -> bool:
        sampling = any(r.running or r.loading is not None for r in self.replicas)
        learning = self.learner_busy or self.publishing
        return learning or any(t.scoring for t in self.teachers) or sampling

    def _pass_lease(self) -> list[Action]:
        """A role with work gets the box: the learner first, so that samples are consumed while they are
        fresh.
        """
        wants: dict[Role, bool] = {
            "learner": self._plan_learner() is not None,
            "teacher": any(
                self._plan_score_again(i) or self._plan_score(i) for i in range(len(self.teachers))
            ),
            "sampler": any(
                self._next_version(r) is not None or any(self._admissible(r)) for r in self.replicas
            ),
        }
        if self.paused:
            wants = {"learner": True}
        for role, wanted in wants.items():
            if wanted and role != self.lease:
                self._switching = True
                return [Lease(self.lease, role)]
        return []

    # -- learner

    def _start_learner(self) -> list[Action]:
        action = self._plan_learner()
        if action is None:
            return []
        self.learner_busy = True
        if isinstance(action, Train):
            self.reexecuted_now = 0
            for key in action.keys:
                self._check_lag(self.tickets[key])
                self.tickets[key].state = State.TRAINING
        return [action]

    def _plan_learner(self) -> Train | Evaluate | None:
        if self.learner_busy:
            return None
        if self._eval_due() is not None:
            group = self._held_out()[: self.config.batch]
            ready = bool(group) and all(self._ready(t) for t in group)
            return Evaluate(self.step, tuple(t.key for t in group)) if ready else None
        if not self._may_train():
            return None
        batch = None if self._relabelling() else self._batch()
        return None if batch is None or self._due_reexecutions(batch) else Train(self.step, tuple(batch))

    def _may_train(self) -> bool:
        """Whether the next optimizer step needs nothing but a batch to start."""
        if self.step == self.config.steps:
            return False
        if any(r.loading is not None and r.loading < self.step for r in self.replicas):
            return False
        return self.config.lag is None or all(r.loaded == self.step for r in self.replicas)

    # -- re-execution

    def _start_reexecutions(self) -> list[Action]:
        if not self.config.reexecutions:
            return []
        keys = self._due_reexecutions(self._reexecutable())
        for key in keys:
            self.tickets[key].state = State.REEXECUTING
        self.reexecuted_now += len(keys)
        return [Reexecute(keys, self._now)] if keys else []

    def _reexecutable(self) -> list[int]:
        """Samples that the next step may want reexecuted now."""
        ahead = self.config.reexecute_ahead
        if ahead and not self.config.deterministic:  # one by one, as they get ready
            return [t.key for t in self._takeable() if self._ready(t)][: self.config.batch]
        blocked = not ahead and (self.learner_busy or self._eval_due() is not None or not self._may_train())
        return [] if blocked or self._relabelling() else self._batch() or []

    @property
    def _next_step(self) -> int:
        """The step that has not started yet."""
        return self.step + any(t.state is State.TRAINING for t in self.tickets.values())

    @property
    def _now(self) -> int:
        """The step as of which calls are executed again; it must not depend on whether that starts early or
        late.
        """
        return self._next_step - self.config.reexecute_ahead

    def _due_reexecutions(self, batch: list[int]) -> tuple[int, ...]:
        """The samples of the next batch that must be reexecuted first."""
        left, now = self.config.reexecutions - self.reexecuted_now, self._now
        old = (
            self.tickets[k] for k in batch if now - self.tickets[k].version >= self.config.reexecute_min_lag
        )
        due = sorted((t for t in old if not t.reexecuted), key=lambda t: (t.version, t.key))
        return tuple(t.key for t in due[: max(0, left)])

    def _relabelling(self) -> bool:
        """Whether the next step waits for new labels."""
        return any(
            t.state in (State.REEXECUTING, State.REEXECUTED) or (t.state is State.SCORING and t.reexecuted)
            for t in self.tickets.values()
        )

    def _check_lag(self, ticket: Ticket) -> None:
        lag = self.step - ticket.version
        if lag > self.config.bound:
            raise RuntimeError(
                f"sample {ticket.sample} has lag {lag} > {self.config.bound}: the schedule is broken"
            )

    def _batch(self) -> list[int] | None:
        """Keys of the next batch, in key order; None while it must wait."""
        size = self.config.batch
        if self.config.lag is not None:
            window = next(iter(self._windows()), [])
            ready = len(window) == size and all(self._ready(t) for t in window)
            return [t.key for t in window] if ready else None
        chosen = [t for t in self._takeable() if self._ready(t)][:size]
        if len(chosen) < size:
            return None
        batch = {t.key for t in chosen}
        left = Counter(t.version + self.config.max_lag for t in self._by_deadline() if t.key not in batch)
        total, step = 0, self._next_step
        for deadline in sorted(left):
            total += left[deadline]
            if total > (deadline - step) * size:
                return None
        return sorted(batch)

    def _takeable(self) -> list[Ticket]:
        """What a batch may be chosen from, the most urgent first: of each version its first B samples."""
        seen: Counter[int] = Counter()
        found = []
        for ticket in self._by_deadline():
            seen[ticket.version] += 1
            if seen[ticket.version] <= self.config.batch:
                found.append(ticket)
        return found

    def _by_deadline(self) -> list[Ticket]:
        """Admitted training samples that are not being trained on, the most urgent first."""
        admitted = (t for t in self.tickets.values() if not t.evaluation)
        waiting = (t for t in admitted if t.state not in (State.PLANNED, State.TRAINING))
        return sorted(waiting, key=lambda t: (t.version, t.key))

    def _ready(self, ticket: Ticket) -> bool:
        return ticket.state is State.SCORED and ticket.graded

    # -- windows

    def _windows(self, evaluation: bool = False) -> list[list[Ticket]]:
        """Samples that the learner has not taken yet, in the order of their numbers, cut into the batches
        that it will take.
        """
        waiting = (
            t for t in self.tickets.values() if t.evaluation == evaluation and t.state is not State.TRAINING
        )
        return _cut(sorted(waiting, key=lambda t: t.key), self.config.batch)

    def _score_groups(self, teacher: int, evaluation: bool) -> Iterator[list[Ticket]]:
        """One call's samples each, in the order in which the learner takes them. No sample can join them any
        more.
        """
        size = self.config.score_batch[teacher]
        for window in self._windows(evaluation):
            whole = evaluation or len(window) == self.config.batch
            for group in _cut([t for t in window if t.teacher == teacher], size):
                if whole or len(group) == size:
                    yield group

    def _left_in_window(self) -> int:
        """How many samples are still to start in the first window that is not fully started."""
        windows = self._windows()
        for window in windows:
            planned = sum(t.state is State.PLANNED for t in window)
            missing = self.config.batch - len(window)  # 0 except in the last one
            if planned + missing:
                return planned + missing
        return self.config.batch

    # -- evaluation: held-out prompts are sampled, scored, evaluated at one version, while the learner waits

    def _eval_due(self) -> int | None:
        due = self.step in self.config.eval_versions and self.step not in self.evaluated
        return self.step if due and self.eval_ids else None

    def _held_out(self) -> list[Ticket]:
        """Held-out samples, in the order in which they are evaluated."""
        return sorted((t for t in self.tickets.values() if t.evaluation), key=lambda t: t.key)

    def _start_evaluation(self) -> None:
        if self._eval_due() is None or self.learner_busy:
            return
        if not any(t.evaluation for t in self.tickets.values()):
            for sample in self.eval_ids:
                self._add(sample)

    # -- teacher

    def _start_teacher(self) -> list[Action]:
        out: list[Action] = []
        for index, teacher in enumerate(self.teachers):
            while teacher.up and teacher.scoring < self.config.score_ahead:
                again = self._plan_score_again(index)
                group = again or self._reserved(self._plan_score(index))
                if not group:
                    break
                teacher.scoring += 1
                for key in group:
                    self.tickets[key].state = State.SCORING
                out.append(Score(index, group, bool(again)))
        return out

    def _plan_score_again(self, teacher: int) -> tuple[int, ...]:
        """Samples whose context changed; their memory is already reserved. Where two runs must agree, none
        before all re-executions are done.
        """
        if self.config.deterministic and any(t.state is State.REEXECUTING for t in self.tickets.values()):
            return ()
        changed = [
            t.key for t in self.tickets.values() if t.state is State.REEXECUTED and t.teacher == teacher
        ]
        return tuple(sorted(changed)[: self.config.score_batch[teacher]])

    def _plan_score(self, teacher: int) -> tuple[int, ...]:
        """The next samples for one call of a teacher."""
        size = self.config.score_batch[teacher]
        sampled = [t for t in self.tickets.values() if t.state is State.SAMPLED and t.teacher == teacher]
        if not self.config.deterministic:
            sampled.sort(key=lambda t: (not t.evaluation, t.version, t.key))
            return tuple(t.key for t in sampled[:size])
        for evaluation in (True, False):
            for members in self._score_groups(teacher, evaluation):
                group = [t for t in members if t.state is not State.SCORED]  # all, unless a teacher was lost
                if group and all(t.state is State.SAMPLED for t in group):
                    return tuple(t.key for t in group)
        return ()

    def _reserved(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """The group if the arena has room for its targets; else its urgent part, for which less urgent
        samples give up their targets (they are scored again later); else nothing, until the learner has freed
        some room.
        """
        if not group or self.reserve(group):
            return group
        first = {t.key for t in self._first()}
        urgent = tuple(k for k in group if k in first)
        # An evaluation holds the learner: all training samples can wait.
        evaluated_next = any(self.tickets[k].evaluation for k in urgent)
        victims = self._victims(first, evaluated_next) if urgent else []
        while urgent:
            if self.reserve(urgent):
                return urgent
            if not victims:
                return ()
            for victim in victims.pop():
                self.reexecuted_now -= victim.reexecuted
                victim.state, victim.reexecuted = State.SAMPLED, False
                self.release(victim.key)
        return ()

    def _first(self) -> list[Ticket]:
        """What the learner takes next: held-out samples, and training samples."""
        if self.config.deterministic:
            return [
                t for evaluation in (True, False) for window in self._windows(evaluation)[:1] for t in window
            ]
        return [*self._by_deadline()[: self.config.batch], *self._held_out()[: self.config.batch]]

    def _victims(self, first: set[int], evaluated_next: bool) -> list[list[Ticket]]:
        """Scored samples that give up their targets together, the least urgent last."""
        kinds = (True, False) if evaluated_next else (False,)
        groups: Iterable[list[Ticket]]
        if self.config.deterministic:
            still = (State.SCORING, State.REEXECUTING, State.REEXECUTED)
            found = [
                g for kind in kinds for i in range(len(self.teachers)) for g in self._score_groups(i, kind)
            ]
            complete = [g for g in found if all(t.state not in still for t in g)]
            groups = sorted(complete, key=lambda g: (not g[0].evaluation, g[0].key))
        else:
            groups = ([t] for t in (*(self._held_out() if evaluated_next else ()), *self._by_deadline()))

        def spared(ticket: Ticket) -> bool:
            return ticket.key in first and (ticket.evaluation or not evaluated_next)

        scored = ([t for t in group if t.state is State.SCORED and not spared(t)] for group in groups)
        return [group for group in scored if group]

    # -- sampler

    def _start_samplers(self) -> list[Action]:
        out: list[Action] = []
        for index, replica in enumerate(self.replicas):
            version = self._next_version(replica)
            if version is not None:
                replica.loading = version
                out.append(Load(index, version))
                continue
            held_out, room = self._admissible(replica)
            keys = [self._admit(index, replica, key) for key in held_out]
            keys += [self._admit(index, replica, key) for key in self._draw(room)]
            if keys:
                out.append(Generate(index, tuple(keys)))
        return out

    def _next_version(self, replica: _Replica) -> int | None:
        """The version that the replica should load now, if any. None while a newer one is being published:
        the step that may be under way would write over what is loaded instead.
        """
        if not replica.up or replica.loading is not None or self.publishing:
            return None
        if replica.blank:  # with a fixed lag the version that it had, which is still in one of the two slots
            keep = self.config.lag is not None and replica.loaded >= 0 and not replica.stale
            return replica.loaded if keep else self.step
        if replica.loaded == self.step:
            return None
        idle = not replica.running
        if self.config.lag is None or replica.stale:
            return self.step if idle or self.config.inflight != "wait" else None
        # Not while another replica samples at this version: if that one is lost, its samples still need this
        # version here.
        sampled = not any(r.running for r in self.replicas) and self._room(replica) <= 0
        return replica.loaded + 1 if sampled else None

    def _room(self, replica: _Replica) -> int:
        """How many samples may be admitted at the replica's version (the docstring's admission rule)."""
        bound = self._bound(replica.loaded) - self.consumed
        outstanding = sum(t.state is not State.PLANNED and not t.evaluation for t in self.tickets.values())
        return max(0, bound - outstanding)

    def _bound(self, version: int) -> int:
        """The number of the first sample that a sampler at this version may not start."""
        return min(self.ahead + version + 1, self.config.steps) * self.config.batch

    def _admissible(self, replica: _Replica) -> tuple[list[int], int]:
        """(held-out samples, number of training samples) that the replica may be given now."""
        waiting = self.config.lag is None and self.config.inflight == "wait"
        draining = waiting and replica.loaded < self.published
        outdated = replica.blank or (replica.stale and replica.loaded < self.step)
        if not replica.up or replica.loading is not None or outdated or draining:
            return [], 0
        # Whole groups where two runs must agree: a batch's composition then does not depend on timing.
        free = self.config.concurrency - len(replica.running)
        free = 0 if self.config.deterministic and replica.running else free
        if free <= 0:
            return [], 0
        held_out: list[int] = []
        if replica.loaded == self.step:
            held_out = [t.key for t in self.tickets.values() if t.evaluation and t.state is State.PLANNED][
                :free
            ]
        if held_out and self.config.deterministic:
            return held_out, 0
        left = self._left_in_window() if self.config.deterministic else free
        return held_out, min(free - len(held_out), left, self._room(replica))

    def _admit(self, index: int, replica: _Replica, key: int) -> int:
        ticket = self.tickets[key]
        if not ticket.evaluation:
            self._count_drawn(ticket)
        ticket.state, ticket.version = State.SAMPLING, replica.loaded
        replica.running.add(key)
        return key

    def _count_drawn(self, ticket: Ticket) -> None:
        self.counts["drawn"] += not ticket.drawn
        ticket.drawn = True

    def _draw(self, count: int) -> list[int]:
        """Keys of the next training samples: restarted ones first, then those a refresh dropped, then new
        prompts.
        """
        if count == 0:
            return []
        planned = sorted(
            t.key for t in self.tickets.values() if t.state is State.PLANNED and not t.evaluation
        )
        return planned[:count] + [self._add_next() for _ in range(count - len(planned))]

    def _add_next(self) -> int:
        if self.retries:
            return self._add(self.retries.pop(0))
        self.cursor += 1
        return self._add(self.prompt_stream(self.cursor - 1))

    def _add(self, sample: SampleId) -> int:
        key = self.next_key
        self.next_key += 1
        self.tickets[key] = Ticket(key, sample, teacher=self.teacher_of(sample))
        return key

    # ---- state on disk -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON. Samples that were being sampled or scored go back one
        state.

        Re-executions that ran ahead left the labels alone: whatever their state, such samples stay scored,
        and are executed again. Other reexecuted samples may have new labels: they are scored from scratch.
        """
        states = self._states_at_rest()
        return {
            "step": self.step,
            "consumed": self.consumed,
            "cursor": self.cursor,
            "next_key": self.next_key,
            "refreshes": self.refreshes,
            "counts": dict(self.counts),
            "evaluated": sorted(self.evaluated),
            "retries": [list(vars(s).values()) for s in self.retries],
            "resume_version": self.resume_version(),
            "tickets": [
                {
                    "key": t.key,
                    "sample": list(vars(t.sample).values()),
                    "state": states[t.key].value,
                    "version": t.version,
                    "graded": t.graded,
                    "drawn": t.drawn,
                }
                for t in self.tickets.values()
                if not t.evaluation
            ],
        }

    def resume_version(self) -> int:
        """The version that samplers load first when a run goes on from here: the newest, or under a fixed lag
        the one before, while its window still lacks samples.
        """
        before = self.step - 1
        if self.config.lag is None or not any(r.loaded == before >= 0 and not r.stale for r in self.replicas):
            return self.step
        kept = sum(state is not State.PLANNED for state in self._states_at_rest().values())
        return before if self._bound(before) > self.consumed + kept else self.step

    def _states_at_rest(self) -> dict[int, State]:
        """The state that each training sample goes back to when all work stops; in groups, where two runs
        must agree.
        """
        labelled = State.SCORED if self.config.reexecute_ahead else State.SAMPLED

        def at_rest(ticket: Ticket) -> State:
            if ticket.reexecuted or ticket.state is State.REEXECUTED:
                return labelled
            back = {
                State.SAMPLING: State.PLANNED,
                State.SCORING: State.SAMPLED,
                State.REEXECUTING: State.SCORED,
            }
            return back.get(ticket.state, ticket.state)

        states = {t.key: at_rest(t) for t in self.tickets.values() if not t.evaluation}
        if not self.config.deterministic:
            return states
        for window in self._windows():
            for group in _cut(window, self.config.concurrency):
                if any(states[t.key] is State.PLANNED for t in group):
                    states.update({t.key: State.PLANNED for t in group})
        for teacher in range(len(self.teachers)):
            for group in self._score_groups(teacher, evaluation=False):
                if any(states[t.key] is not State.SCORED for t in group):
                    states.update({t.key: State.SAMPLED for t in group if states[t.key] is State.SCORED})
        return states

    def load_state_dict(self, state: dict[str, Any], anew: bool = False) -> None:
        """`anew`: the recipe has changed so that samples in flight must be sampled again."""
        for name in ("step", "consumed", "cursor", "next_key", "refreshes"):
            setattr(self, name, state[name])
        self.counts = Counter(state["counts"])
        self.evaluated = set(state["evaluated"])
        self.retries = [SampleId(*s) for s in state["retries"]]
        self.tickets = {}
        for t in state["tickets"]:
            sample = SampleId(*t["sample"])
            ticket = Ticket(t["key"], sample, State(t["state"]), t["version"], t["graded"], t["drawn"])
            ticket.teacher = self.teacher_of(sample)
            if anew:
                ticket.state = State.PLANNED
            if ticket.state is State.PLANNED:
                ticket.graded = False
            self.tickets[ticket.key] = ticket
        if self.config.lag is not None:
            for replica in self.replicas:
                replica.loaded = self.step if anew else state["resume_version"]
        if anew:
            self.consumed = self.step * self.config.batch  # admission counts in batches of the current size
