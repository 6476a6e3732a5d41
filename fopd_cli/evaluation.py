"""`fopd eval`: the score of a model on a task's held-out prompts, by the same code and with the same random
numbers as the run's own evaluation, so that the two agree.

With a file for its rows it is resumable (each row is written when it is finished and never repeated), can
generate first and grade later, and can be spread over several processes, one per device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from fopd_cli import paths
from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Sampler
from fopd_cli.engines.registry import engine_of
from fopd_cli.engines.text.templates import check_variables
from fopd_cli.errors import UserError
from fopd_cli.files import Appender, write_synced
from fopd_cli.recipe import Recipe
from fopd_cli.runtime.build import make_sampler, resolve_dtype, student_frame, task_arguments
from fopd_cli.runtime.crew import messages as m
from fopd_cli.runtime.crew.environment import LocalEnvironments
from fopd_cli.runtime.crew.fleet import Fleet, Mailbox, WorkerSpec
from fopd_cli.runtime.crew.roles import graded
from fopd_cli.runtime.journal import records
from fopd_cli.runtime.journal.sinks import mean_and_error
from fopd_cli.runtime.placement import cuda_devices, devices_of_a_replica
from fopd_cli.runtime.scheduling.conversations import Conversations
from fopd_cli.runtime.scheduling.lengths import keep_what_fits, rooms
from fopd_cli.runtime.scheduling.params import sampling_params
from fopd_cli.runtime.scheduling.prompts import PromptStream, check_followed, context_tokens, evaluation_ids
from fopd_cli.samples import Prompt, Request, Rollout, SampleId
from fopd_cli.tasks import load_task

Row = dict[str, Any]
Mode = Literal["all", "generate", "grade"]


@dataclass(frozen=True)
class Job:
    """What one process does. `recipe` supplies the task, the sampler's settings, `eval.samples` and the
    seed.
    """

    model: str
    recipe: Recipe
    mode: Mode
    groups: list[list[int]]  # numbers of held-out samples, batch by batch; empty in mode `grade`
    rows: list[Row]  # rows that only need grading


def evaluate(
    model: str, recipe: Recipe, out: Path | None, mode: Mode = "all", jobs: int = 1
) -> dict[str, Any]:
    """Sample, grade, average. `out` keeps the rows."""
    if mode != "all" and out is None:
        raise UserError(f"--{mode}-only: give --out FILE, which the rows are written to or read from")
    book = _Book(out, _digest(model, recipe))
    if mode == "grade" and not book.rows:
        raise UserError(f"--grade-only: {out} holds no rows; make some with --generate-only")
    began, already = time.monotonic(), len(book.rows)
    fresh: list[Row] = []

    def take(row: Row) -> None:
        if mode != "grade":
            fresh.append(row)
        book.write(row)

    with book:
        _work(_jobs(model, recipe, mode, jobs, book.rows), _job_devices(recipe, mode), take)
        if mode != "generate":
            _judge(model, recipe, book)
    rows = sorted(book.rows.values(), key=lambda row: row["number"])
    if out is not None:
        book.rewrite()
    seconds = time.monotonic() - began
    found = {
        "model": model,
        **summary(rows, recipe.eval.follow),
        "samples": recipe.eval.samples,
        "already_done": already if mode != "grade" else 0,
    }
    if fresh:
        found["tokens_per_second"] = sum(row["tokens"] for row in fresh) / seconds
    return found


def _judge(model: str, recipe: Recipe, book: _Book) -> None:
    """Rows that cannot be graded get the KL to their teacher instead."""
    open_ = {n: row for n, row in book.rows.items() if not row["gradable"] and row["kl"] is None}
    if open_:
        from fopd_cli.teacher_kl import teacher_kl

        for found in teacher_kl(model, recipe, list(open_.values())):
            book.write({**open_[found.number], "kl": found.kl, "kl_tokens": found.tokens})


def summary(rows: list[Row], follow: str | None = None) -> dict[str, Any]:
    """Figures over all rows; the score is mean@k over prompts, None while nothing is graded.

    Rows without a grade give the KL to the teacher: the mean over tokens, with a standard error over prompts.
    With several held-out sets, the metrics are those of `follow` (None: the first), and all are by name under
    "sets".
    """
    by_set: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        by_set[row.get("set")].append(row)
    if len(by_set) < 2:
        return _metrics(rows)
    found = {name: _metrics(own) for name, own in by_set.items()}
    own_set = next(iter(found)) if follow is None else follow
    if own_set not in found:
        raise UserError(
            f"eval.follow: no row is of the held-out set {follow!r}; there are {', '.join(map(str, found))}"
        )
    return {"set": own_set, **found[own_set], "sets": found}


def _metrics(rows: list[Row]) -> dict[str, Any]:
    """The metrics of one held-out set."""
    by_prompt: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["score"] is not None:
            by_prompt[row["prompt_index"]].append(row["score"])
    score, error = mean_and_error(by_prompt.values()) if by_prompt else (None, None)
    measured: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["kl"] is not None:
            measured[row["prompt_index"]].append(row["kl"])
    kl: Row = {}
    if measured:
        tokens = sum(row["kl_tokens"] for row in rows if row["kl"] is not None)
        mean = sum(row["kl"] * row["kl_tokens"] for row in rows if row["kl"] is not None) / tokens
        kl = {"kl": mean, "kl_error": _plain(mean_and_error(measured.values())[1])}
    episodes: Any = [SimpleNamespace(turns=row["turns"], calls=row["calls"]) for row in rows]
    return {
        "score": score,
        "score_error": _plain(error),
        **kl,
        "prompts": len({row["prompt_index"] for row in rows}),
        "rows": len(rows),
        "truncated": sum(row["finish"] == "length" for row in rows) / max(1, len(rows)),
        **records.mean_metrics([row["figures"] for row in rows]),
        **records.episodes(episodes),
        **records.tool_seconds(episodes),
    }


def _plain(value: float | None) -> float | None:
    """nan (the error of a single prompt) becomes None, since JSON has no nan."""
    return value if value is not None and math.isfinite(value) else None


def _digest(model: str, recipe: Recipe) -> str:
    """A hash of everything that rows depend on, teachers and what they read included: some rows hold a KL to
    them.
    """
    teachers = [[t.name, t.model, t.context, t.template, t.k] for t in recipe.teachers]
    task = recipe.task.model_dump(mode="json")
    if isinstance(task.get("eval"), dict):  # held-out sets by name: their order numbers the rows
        task["eval"] = list(task["eval"].items())
    asked = {
        "model": model,
        "task": task,
        "sampler": recipe.sampler.model_dump(mode="json"),
        "eval": recipe.eval.model_dump(mode="json", exclude={"follow"}),  # it changes no row
        "seed": recipe.seed,
        "teachers": teachers,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


class _Book:
    """The rows by number, and the file that keeps them: a header, then one row per line as they finish."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self.path, self.header = path, {"fopd_eval": digest}
        self.rows: dict[int, Row] = {}
        self._file: Appender | None = None
        if path is not None and paths.exists(path):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold U+2028
            found = [
                json.loads(line) for line in lines if line.endswith("}")
            ]  # the last one may have been cut off
        except (OSError, ValueError) as error:
            raise UserError(f"--out: {path} cannot be read as rows of fopd eval: {error}") from None
        if not found or found[0] != self.header:
            raise UserError(
                f"--out: {path} is of another model, task, sampler or seed, or no file of fopd eval; "
                "delete it or name another"
            )
        self.rows = {row["number"]: row for row in found[1:]}

    def __enter__(self) -> _Book:
        if self.path is not None:
            self.rewrite()
            self._file = Appender(self.path)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        self.rows[row["number"]] = row
        if self._file is None:
            return
        try:
            self._file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
        except OSError as error:
            raise UserError(
                f"--out: cannot write {self.path}: {error.strerror}; it keeps the rows so far, and the same "
                "command goes on from there"
            ) from None

    def rewrite(self) -> None:
        """Rewrite the file with each row once."""
        assert self.path is not None
        text = [json.dumps(self.header)]
        text += [json.dumps(self.rows[n], ensure_ascii=False) for n in sorted(self.rows)]
        try:
            write_synced(self.path, "\n".join(text) + "\n")
        except OSError as error:
            raise UserError(f"--out: cannot write {self.path}: {error.strerror}") from None


def _jobs(model: str, recipe: Recipe, mode: Mode, jobs: int, rows: dict[int, Row]) -> list[Job]:
    """The work that is left, in at most `jobs` parts."""
    if mode == "grade":
        todo = list(rows.values())
        return [Job(model, recipe, mode, [], part) for i in range(jobs) if (part := todo[i::jobs])]
    stream = _stream(model, recipe, load_task(*task_arguments(recipe)))
    for notice in stream.notices:
        print(f"note: {notice}", file=sys.stderr)
    count = len(evaluation_ids(recipe, stream))
    size = recipe.sampler.concurrency  # the groups that a run forms
    groups = [[n for n in range(i, min(i + size, count)) if n not in rows] for i in range(0, count, size)]
    groups = [group for group in groups if group]
    ungraded = [row for row in rows.values() if mode == "all" and row["score"] is None and row["gradable"]]
    return [
        Job(model, recipe, mode, groups[i::jobs], ungraded[i::jobs])
        for i in range(jobs)
        if groups[i::jobs] or ungraded[i::jobs]
    ]


def _stream(model: str, recipe: Recipe, task: Any) -> PromptStream:
    """The held-out prompts that fit, as in the run. Teachers whose configuration cannot be read here set no
    limit.
    """
    tokenizer, config = hf.load_tokenizer(model, "MODEL"), hf.load_config(model, "MODEL")
    local = [t for t in recipe.teachers if not engine_of(t).remote and t.template == "student"]
    configs = {}
    for t in local:
        with contextlib.suppress(UserError):
            configs[t.name] = ("teacher.model", hf.load_config(t.model, "teacher.model"))
    # else a teacher's template may be the one that uses them
    if all(t.template == "student" for t in recipe.teachers):
        check_variables(recipe.template_kwargs, [tokenizer])
    stream = PromptStream(
        task,
        student_frame(recipe, tokenizer),
        recipe.seed,
        recipe.sampler.samples_per_prompt,
        recipe.teachers,
    )
    stream.notices += keep_what_fits(recipe, stream, rooms(recipe, config, configs, {}))
    check_followed(recipe, stream)
    return stream


def default_jobs(recipe: Recipe) -> int:
    """One replica of the sampler per device, or per group of devices that a replica is split over."""
    return max(1, cuda_devices() // devices_of_a_replica(recipe.sampler))


def _job_devices(recipe: Recipe, mode: Mode) -> list[tuple[int, ...]]:
    """The devices of the first job, the second, and so on; further jobs start over. Grading needs none."""
    cuda, split = cuda_devices(), devices_of_a_replica(recipe.sampler)
    if cuda == 0 or mode == "grade":
        return [()]
    if cuda < split:
        key = f"sampler.{engine_of(recipe.sampler).split_key}"
        raise UserError(f"{key}: a replica is split over {split} devices, there are {cuda}; lower it")
    return [tuple(range(i, i + split)) for i in range(0, cuda - split + 1, split)]


def _work(jobs: list[Job], devices: list[tuple[int, ...]], take: Callable[[Row], None]) -> None:
    """Run the jobs: a single one in this process, several in a process each."""
    if len(jobs) <= 1:
        for job in jobs:
            for row in _rows(job, torch.device("cuda" if devices[0] else "cpu")):
                take(row)
        return
    threads = max(1, torch.get_num_threads() // len(jobs))
    with tempfile.TemporaryDirectory(prefix="fopd-eval-") as logs, Fleet(Path(logs), 3600.0, 3600.0) as fleet:
        for i, job in enumerate(jobs):
            spec = WorkerSpec("eval", i, len(jobs), devices[i % len(devices)], threads)
            fleet.start(spec, evaluation_main, job)
        left = len(jobs)
        while left:
            for _, message in fleet.receive(timeout=0.5):
                if isinstance(message, m.Ready):
                    left -= 1
                else:
                    take(message)


def evaluation_main(spec: WorkerSpec, mailbox: Mailbox, job: Job) -> None:
    """One process's share; sends `Ready` when all of it is done."""
    for row in _rows(job, torch.device("cuda", 0) if spec.devices else torch.device("cpu")):
        mailbox.send(row)
    mailbox.send(m.Ready())
    while not isinstance(mailbox.receive(block=True), m.StopCommand):
        pass


def _rows(job: Job, device: torch.device) -> Iterator[Row]:
    """Finished rows, one by one."""
    recipe = job.recipe
    task: Any = load_task(*task_arguments(recipe))  # with episodes or without
    if job.rows:
        prompts = task.prompts("eval")
        for row in job.rows:
            yield {**row, **_grade(task, prompts[row["prompt_index"]], row["answer"])}
    if not job.groups:
        return
    stream = _stream(job.model, recipe, task)
    tokenizer = stream.frame.tokenizer
    dtype = resolve_dtype(recipe.sampler.dtype, device.type == "cuda")
    vocab = _vocab(job.model, recipe)
    sampler = make_sampler(
        recipe, job.model, dtype, device, context_tokens(recipe, stream, judged=False), vocab
    )
    ids = evaluation_ids(recipe, stream)
    params = sampling_params(recipe, evaluation=True)
    with contextlib.ExitStack() as stack:
        environments = stack.enter_context(LocalEnvironments(task, stream.frame)) if stream.episodic else None
        for group in job.groups:
            requests = [Request(i, stream.token_ids(ids[i]), ids[i].seed(recipe.seed), params) for i in group]
            if environments is None:
                finished = _sample(sampler, requests)
            else:
                finished = converse(
                    sampler, requests, environments, {i: stream.prompt(ids[i]) for i in group}, tokenizer
                )
            for rollout in finished:
                sample = ids[rollout.key]
                row = _row(stream.prompt(sample), sample, rollout, tokenizer)
                if job.mode != "generate":
                    row |= _grade(task, stream.prompt(sample), row["answer"])
                if job.mode == "generate" or not row["gradable"]:  # the teacher may have to judge it
                    row["token_ids"] = rollout.response_ids.tolist()
                yield row


def _vocab(model: str, recipe: Recipe) -> int:
    """Number of ids that the model may sample: as in the run, those shared with all teachers that are
    available here.
    """
    found = [hf.vocab_size(hf.load_config(model, "MODEL"))]
    for teacher in recipe.teachers:
        if not engine_of(teacher).remote:
            try:
                found.append(hf.vocab_size(hf.load_config(teacher.model, "teacher.model")))
            except UserError as error:
                say = f"warning: {error}; the model may sample ids that this teacher does not have"
                print(say, file=sys.stderr, flush=True)
    return min(found)


def _grade(task: Any, prompt: Prompt, answer: str) -> Row:
    score, figures = graded(task, prompt, answer)
    gradable = score == score  # nan: there is no reference
    return {
        "score": score if gradable else None,
        "gradable": gradable,
        "kl": None,
        "figures": {k: v for k, v in figures.items() if v == v},
    }


def _row(prompt: Prompt, sample: SampleId, rollout: Rollout, tokenizer: Any) -> Row:
    return {
        "number": rollout.key,
        "prompt_index": sample.prompt,
        "sample": sample.repeat,
        **({} if prompt.held_out is None else {"set": prompt.held_out}),
        "prompt": prompt.text or prompt.messages,
        "response": hf.decode(tokenizer, rollout.response_ids),
        "answer": hf.decode(tokenizer, rollout.last_turn) if rollout.answer is None else rollout.answer,
        "score": None,
        "gradable": True,
        "kl": None,
        "figures": {},
        "finish": rollout.finish,
        "tokens": rollout.response_length,
        "turns": rollout.turns,
        "calls": rollout.calls,
    }


def _sample(sampler: Sampler, requests: list[Request]) -> Iterator[Rollout]:
    sampler.submit(requests)
    while sampler.busy:
        yield from sampler.step()


def converse(
    sampler: Sampler,
    requests: list[Request],
    environments: LocalEnvironments,
    prompts: dict[int, Prompt],
    tokenizer: Any,
    now: int = 0,
) -> Iterator[Rollout]:
    """Whole episodes: turns are sampled while tools of other episodes run."""
    conversations = Conversations(
        tokenizer,
        lambda key: (prompts[key], now),
        lambda _, following: sampler.submit(following),
        environments.send,
        together=False,
    )
    conversations.start(0, requests)
    while conversations:
        if sampler.busy:
            yield from (rollout for _, rollout in conversations.on_turns(0, sampler.step()))
        for seen in environments.receive(block=bool(conversations) and not sampler.busy):
            assert isinstance(seen, m.Observed)  # nothing is executed again here
            yield from (rollout for _, rollout in conversations.on_observed(seen))
