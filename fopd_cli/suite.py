"""`fopd eval --suite`: runs tasks of EleutherAI's lm-evaluation-harness, in the harness itself and on its own
backends, so that figures are comparable with published ones.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from fopd_cli import paths
from fopd_cli.chat import has_template
from fopd_cli.engines.models import hf
from fopd_cli.engines.registry import engine_of
from fopd_cli.errors import UserError, WorkerError
from fopd_cli.export import student_of
from fopd_cli.recipe import Recipe, Sampler
from fopd_cli.runtime.build import resolve_dtype
from fopd_cli.runtime.journal.rundir import RunDir
from fopd_cli.runtime.placement import cuda_devices

Record = dict[str, Any]


class Backend(NamedTuple):
    """One of the harness's backends: the package it needs, and its arguments from a run's sampler section."""

    package: str
    arguments: Callable[[Sampler], dict[str, Any]]


def _of_vllm(sampler: Sampler) -> dict[str, Any]:
    section = sampler.vllm
    found = {"tensor_parallel_size": section.tensor_parallel, "gpu_memory_utilization": section.gpu_memory}
    return {key: value for key, value in found.items() if value is not None}


BACKENDS = {"hf": Backend("transformers", lambda _: {}), "vllm": Backend("vllm", _of_vllm)}
BESIDE = ("teacher", "untrained")
CPU_BATCH = 8  # requests at a time; on CUDA the harness finds the largest that fits
INSTALL = "pip install 'fopd[suite]'"


@dataclass(frozen=True)
class Subject:
    """A model to measure. `who` is its column; `step` is set for a run's student."""

    who: str
    model: str
    step: int | None = None


@dataclass(frozen=True)
class Terms:
    """How all subjects are measured. `limit` is the number of samples per task."""

    backend: str
    dtype: str
    cuda: bool
    limit: int | None = None
    chat: bool = False
    seed: int = 0
    engine: tuple[tuple[str, Any], ...] = ()  # further arguments of the backend


def check_installed() -> None:
    """Raises `UserError` if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--suite: needs the lm_eval package (lm-evaluation-harness): {INSTALL}")


def of_run(run: RunDir, recipe: Recipe, step: int | None, beside: Sequence[str]) -> list[Subject]:
    """The run's student and the models beside it. Raises `UserError` for one that cannot be measured."""
    unknown = next((name for name in beside if name not in BESIDE), None)
    if unknown is not None:
        raise UserError(f"--beside: there is no {unknown!r}; there are {', '.join(BESIDE)}")
    remote = [t.name for t in recipe.teachers if engine_of(t).remote]
    if "teacher" in beside and remote:
        raise UserError(f"--beside: teacher {remote[0]!r} runs on a server, which the harness is not told of")
    path = student_of(run, step)
    at = json.loads((path / "fopd.json").read_text(encoding="utf-8"))["step"]
    found = [Subject("student", str(path), at)]
    if "untrained" in beside:
        found.append(Subject("untrained", recipe.student.model))
    if "teacher" in beside:
        found += [Subject(t.name, t.model) for t in recipe.teachers]
    return found


def terms(backend: str, recipe: Recipe | None, model: str, limit: int | None, chat: bool | None) -> Terms:
    """Whatever is not given follows the run: its dtype, its seed, and whether its prompts were chat."""
    cuda = cuda_devices() > 0
    if backend not in BACKENDS:
        raise UserError(f"--backend: there is no {backend!r}; choose from {', '.join(BACKENDS)}")
    package = BACKENDS[backend].package
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--backend: {package} is not installed: pip install 'fopd[{package}]'")
    if recipe is None:
        return Terms(backend, "auto" if cuda else "float32", cuda, limit, bool(chat))
    if chat is None:
        chat = has_template(recipe, hf.load_tokenizer(model, "MODEL"))
    dtype = resolve_dtype(recipe.sampler.dtype, cuda)
    name = str(dtype).removeprefix("torch.")
    engine = BACKENDS[backend].arguments(recipe.sampler)
    return Terms(backend, name, cuda, limit, chat, recipe.seed, tuple(engine.items()))


def measure(subjects: Sequence[Subject], asked: Sequence[str], terms: Terms) -> Iterator[Record]:
    """One record per figure, subject by subject. Tasks load before any model does; raises `UserError` for one
    that cannot be loaded.
    """
    check_installed()
    manager = _manager(asked)
    for subject in subjects:
        yield from _measured(subject, _loaded(asked, manager), terms)


def _manager(asked: Sequence[str]) -> Any:
    """The harness's task index. Reading it takes seconds, so it stays empty if only files are asked for."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(_is_file(name) for name in asked))
    known = set(manager.all_tasks)
    for name in asked:
        if name in known:
            continue
        if not _is_file(name):
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "lm_eval ls tasks prints all"
            raise UserError(f"--suite: the harness has no task {name!r}; {hint}")
        if not paths.is_file(name):
            raise UserError(f"--suite: there is no file {name!r}{paths.similar(Path(name))}")
    return manager


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _loaded(asked: Sequence[str], manager: Any) -> list[Any]:
    """The harness's task objects, with their data."""
    found = []
    for name in asked:
        try:
            there = _of_file(Path(name), manager) if _is_file(name) else manager.load([name])
        except Exception as error:
            raise UserError(f"--suite: {name}: cannot be loaded: {_first_line(error)}") from error
        groups, members = there["groups"], {t for g in there["groups"].values() for t in g.get_all_tasks()}
        inner = {g.name for group in groups.values() for g in group.get_all_groups()}
        found += [group for key, group in groups.items() if key not in inner]
        found += [task for task in there["tasks"].values() if task not in members]
    return found


def _of_file(path: Path, manager: Any) -> Any:
    """A task from a YAML file. Its data files are next to it or in the current folder."""
    path = path.resolve()
    with contextlib.suppress(FileNotFoundError), contextlib.chdir(path.parent):
        return manager.load([str(path)])
    return manager.load([str(path)])


def _measured(subject: Subject, tasks: list[Any], terms: Terms) -> Iterator[Record]:
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    if not terms.cuda:  # vLLM would pin its threads to cores, which a container may refuse
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        model = get_model(terms.backend).create_from_arg_obj(
            {"pretrained": subject.model, "dtype": terms.dtype, **dict(terms.engine)},
            {"batch_size": "auto" if terms.cuda else CPU_BATCH, "device": "cuda" if terms.cuda else "cpu"},
        )
        found = simple_evaluate(
            model=model,
            tasks=tasks,
            limit=terms.limit,
            log_samples=False,
            apply_chat_template=terms.chat,
            random_seed=terms.seed,
            numpy_random_seed=terms.seed,
            torch_random_seed=terms.seed,
            fewshot_random_seed=terms.seed,
        )
    except Exception as error:
        raise WorkerError(f"--suite: the harness failed on {subject.model}: {_first_line(error)}") from error
    _end(model)
    del model
    gc.collect()  # before the next one is loaded
    assert found is not None  # there is only one process
    yield from _records(subject, terms, found)


def _end(model: Any) -> None:
    """vLLM's engine is a process that holds its memory until it is told to end."""
    engine = getattr(getattr(model, "model", None), "llm_engine", None)
    if engine is not None:
        engine.engine_core.shutdown()


def _records(subject: Subject, terms: Terms, found: Any) -> Iterator[Record]:
    """The harness names a figure `metric,filter` and its error `metric_stderr,filter`."""
    members = {name for group in found.get("group_subtasks", {}).values() for name in group}
    for name, figures in found["results"].items():
        samples = found["n-samples"].get(name, {}).get("effective")
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            yield {
                "suite": name,
                "metric": metric,
                "filter": filtered,
                "who": subject.who,
                "value": _plain(value),
                "error": _plain(figures.get(f"{metric}_stderr,{filtered}")),
                "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                "samples": samples,
                "shots": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                "member": name in members,
                "step": subject.step,
                "model": subject.model,
                "backend": terms.backend,
                "limit": terms.limit,
                "chat": terms.chat,
                "harness": found.get("lm_eval_version"),
                "time": round(time.time(), 3),
            }


def _plain(value: Any) -> float | None:
    """The figure; None if there is none (the harness says "N/A")."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _first_line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
