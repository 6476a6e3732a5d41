"""The `fopd` command: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fopd_cli import __version__, paths
from fopd_cli.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER,
    EXIT_WORKER,
    Interrupted,
    Signalled,
    UserError,
    WorkerError,
    disk_error,
)
from fopd_cli.runtime.crew import openmp, warm

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a big language model into a small one, on policy and asynchronously, with freshness "
    "control (f-OPD). Exit codes: 0 done, 2 your mistake (nothing is lost), 3 a worker failed (the "
    "last checkpoint is intact), 130 interrupted by Ctrl-C, SIGTERM or a terminal that closed (a "
    "checkpoint was written).",
)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; see fopd recipe --explain.")
]
MaybeRecipe = Annotated[
    Path | None,
    typer.Argument(
        metavar="RECIPE", help="The recipe, a YAML file; fopd new writes one.", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one key of the recipe, for example learner.steps=100."
    ),
]
LiveOption = Annotated[
    bool,
    typer.Option("--live", help="A view in the terminal: progress, busy roles, figures, the newest answer."),
]
StepOption = Annotated[
    int | None, typer.Option(metavar="N", help="The checkpoint of this step; default: the newest sound one.")
]

EXPORTED = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names of torch's dtypes


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where recipe.yaml is written.")] = Path(),
    student: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A directory or a hub id; it is trained.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The same, of the same family; it judges.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Questions: a file, a directory, or hf:owner/name.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the questions; default: found by its name.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of answers to grade by; default: found, if any.")
    ] = None,
) -> None:
    """Write a recipe for your models and your data: inspect both, ask for what is missing, say what was
    assumed, and check the recipe as `fopd doctor` does.
    """
    from fopd_cli.new import ask

    prompt = typer.prompt if ask.at_terminal() else None
    asking = None if prompt is None else (lambda text, default: str(prompt(text, default=default, err=True)))
    names = ask.complete(student, teacher, data, asking)
    from fopd_cli.new.write import write

    path, findings = write(folder, *names, question, answer, lambda line: typer.echo(line, err=True))
    for finding in findings:
        typer.echo(str(finding))
    if any(f.level == "error" for f in findings):
        raise UserError(
            f"{path}: written, but it will not run on this machine until the errors above are fixed"
        )
    typer.echo(f"{path}: ready; next: fopd run {path}")


@app.command("plan")
def plan_command(
    recipe: RecipeArgument,
    devices: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=1024, help="How many; 0: the CPU. Default: this machine's."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="h100, h200, a100, l40s, rtx4090, ...; default: h100, or this machine's."
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", min=1, help="Of each device; default: what NAME has.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="MEAN,MAX|FILE",
            help="Tokens of the responses: log-normal, a file of numbers, or a run directory. Default: those "
            "of --from, else half of sampler.max_new_tokens.",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="A run whose measured seconds replace the arithmetic."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="P", min=0, help="Of one device for an hour.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    set_: SetOption = None,
) -> None:
    """What a run would take on some devices: memory, seconds, lag, hours, cost, and the best split.

    The real schedule is driven on a virtual clock. No device is needed, and nothing is downloaded but the
    models' configurations.
    """
    from fopd_cli.plan import page
    from fopd_cli.plan.command import plan
    from fopd_cli.plan.split import best
    from fopd_cli.recipe import load_recipe

    found, chosen = plan(load_recipe(recipe, set_ or ()), devices, device, memory, lengths, from_)
    if chosen is not None:
        typer.echo(chosen, err=True)
    if json_:
        typer.echo(json.dumps(page.plain(found, best(found), price), indent=1))
        return
    for text in page.text(found, best(found), price):
        typer.echo(text)


@app.command()
def run(
    recipe: MaybeRecipe = None,
    set_: SetOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where everything goes; default: runs/ and the recipe's name. Must be new."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved recipe and the placement on this machine; start and load nothing.",
        ),
    ] = False,
    live: LiveOption = False,
) -> None:
    """Distil: sample, judge, learn, until learner.steps. Ctrl-C or SIGTERM writes a checkpoint and stops; a
    second one stops at once.

    The checks of `fopd doctor` come first. Metrics, checkpoints and the student are written to the run
    directory.
    """
    from fopd_cli.recipe import dump_recipe, load_recipe

    if recipe is None:
        raise UserError(
            "no recipe given: fopd run RECIPE; fopd new writes one for your models and data, and recipes/ in "
            "the repository holds examples"
        )
    parsed = load_recipe(recipe, set_ or ())
    path = run_dir or Path("runs") / recipe.stem
    if dry_run:
        from fopd_cli.inputs import with_engines
        from fopd_cli.runtime import devices
        from fopd_cli.runtime.placing import placed

        parsed = with_engines(parsed)
        typer.echo(dump_recipe(parsed), nl=False)
        try:
            typer.echo(f"# here ({devices.count()} CUDA devices): {placed(parsed).describe()}")
        except UserError as error:
            typer.echo(f"# here: {error}")
        return
    warm.begin()
    from fopd_cli import launch

    _report(launch.run(parsed, path, live), path)


@app.command()
def resume(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="The directory of an interrupted or finished run.")
    ],
    step: StepOption = None,
    set_: SetOption = None,
    live: LiveOption = False,
) -> None:
    """Continue a run from its newest sound checkpoint, exactly where it left off.

    `--set learner.steps=...` makes it longer. Overrides are saved in recipe.yaml, and recipe-history.jsonl
    records from which step they apply. Student, teacher, task and seed cannot change.
    """
    warm.begin()
    from fopd_cli import launch

    _report(launch.resume(run_dir, step, set_ or [], live), run_dir)


@app.command()
def fork(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="The run; it is only read, and may be going on.")
    ],
    step: StepOption = None,
    set_: SetOption = None,
    new: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Of the fork; default: RUN_DIR-fork-N. Must be new."),
    ] = None,
) -> None:
    """Continue from a checkpoint in a new directory, with other settings: the same run up to step N, a
    different one from there on.

    As with resume, student, teacher, task and seed cannot change.
    """
    warm.begin()
    from fopd_cli import launch

    target = launch.fork_name(run_dir, step) if new is None else new
    _report(launch.fork(run_dir, target, step, set_ or []), target)


@app.command("runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the runs are.")] = Path("runs"),
) -> None:
    """A table of the runs here: how far each is, its newest score and KL, and whether it is running."""
    from fopd_cli.report.tables import of_runs

    typer.echo(of_runs(folder))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN")],
    second: Annotated[Path, typer.Argument(metavar="RUN")],
) -> None:
    """How two runs differ, in the keys of their recipes and in their results."""
    from fopd_cli.report.tables import of_differences

    typer.echo(of_differences(first, second))


@app.command("eval")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|RUN_DIR", help="A model directory, a hub id, or a run (its student)."),
    ],
    task: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe whose task, sampler and eval sections say what to do; default: the run's own.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Responses to each prompt (mean@N).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every generation and its score there, as jsonl; existing rows are not done again.",
        ),
    ] = None,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="Leave the grading for later (--out).")
    ] = False,
    grade_only: Annotated[
        bool, typer.Option("--grade-only", help="Grade all rows in --out (again).")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes; default: one a CUDA device, one on a CPU."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Of a run: the student of this checkpoint; it stays in RUN_DIR/exports."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|YAML[,..]",
            help="Tasks of the lm-evaluation-harness instead, by name or as files; a run keeps the results.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of --suite: only the first N samples of a task.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="teacher,untrained", help="Of --suite, for a run: what is measured beside its student."
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="hf|vllm", help="Of --suite: the harness's own backends.")
    ] = "hf",
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            help="Of --suite: without or with the chat template; default: like the run's own prompts.",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Score a model on a task's held-out prompts: exact match, mean@k, with a standard error over prompts.

    Without answers to grade (task.name: chat, task.answer: null), it measures the KL to the teacher instead.
    It uses the code and random numbers of the run's own evaluation, so a finished run gets the same score. If
    interrupted, the same command with the same --out continues.
    """
    from fopd_cli.recipe import load_recipe

    if generate_only and grade_only:
        raise UserError("--generate-only, --grade-only: choose one of them")

    folder = Path(model)
    is_run = paths.is_file(folder / "recipe.yaml")
    ours = {"--task": task, "--samples": samples, "--generate-only": generate_only, "--jobs": jobs}
    ours |= {"--grade-only": grade_only}
    theirs = {"--limit": limit, "--beside": beside, "--raw, --chat": raw}
    given = {name: value for name, value in (theirs if suite is None else ours).items() if value is not None}
    for name in [name for name, value in given.items() if suite is None or value is not False]:
        raise UserError(f"{name}: {'belongs to' if suite is None else 'does not go with'} --suite")
    if suite is not None:
        _suite(folder if is_run else None, model, suite, limit, beside, backend, raw, step, out, set_ or [])
        return
    source = task or (folder / "recipe.yaml" if is_run else None)
    if source is None:
        raise UserError(
            f"{model}: is not a run directory (it has no recipe.yaml); for a model give --task, a "
            "recipe that says what to evaluate on"
        )
    overrides = list(set_ or [])
    if not is_run:
        overrides.append(f"student.model={json.dumps(model)}")
    if samples:
        overrides.append(f"eval.samples={samples}")
    recipe = load_recipe(source, overrides)
    if step is not None and not is_run:
        raise UserError("--step: names a checkpoint of a run, but MODEL is not a run")
    warm.begin()
    from fopd_cli.evaluation import default_jobs
    from fopd_cli.evaluation import evaluate as score
    from fopd_cli.export import student_of
    from fopd_cli.inputs import check_model_name, with_engines
    from fopd_cli.runtime.journal.rundir import RunDir

    path = str(student_of(RunDir.open(folder), step)) if is_run else recipe.student.model
    check_model_name(path, "MODEL")
    recipe = with_engines(recipe)
    mode: Any = "generate" if generate_only else "grade" if grade_only else "all"
    typer.echo(json.dumps(score(path, recipe, out, mode, jobs or default_jobs(recipe)), indent=1))


def _suite(
    folder: Path | None,
    model: str,
    asked: str,
    limit: int | None,
    beside: str | None,
    backend: str,
    raw: bool | None,
    step: int | None,
    out: Path | None,
    set_: list[str],
) -> None:
    """`fopd eval --suite` of a run (`folder`) or of a model; each model's figures are written at once."""
    if folder is None:
        for name in [n for n, value in (("--beside", beside), ("--step", step), ("--set", set_)) if value]:
            raise UserError(f"{name}: is for runs, but {model} is not one (it has no recipe.yaml)")
    from fopd_cli import suite
    from fopd_cli.inputs import check_model_name
    from fopd_cli.report import suites, tables

    suite.check_installed()
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names:
        raise UserError("--suite: names no task")
    recipe = None
    if folder is None:
        check_model_name(model, "MODEL")
        subjects = [suite.Subject("model", model)]
    else:
        from fopd_cli.runtime.journal.rundir import RunDir

        run = RunDir.open(folder)
        recipe = run.load_recipe(set_)
        others = [name.strip() for name in (beside or "").split(",") if name.strip()]
        subjects = suite.of_run(run, recipe, step, others)
    terms = suite.terms(backend, recipe, subjects[0].model, limit, None if raw is None else not raw)
    target = out or (None if folder is None else folder / suites.FILE)
    found = []
    for record in suite.measure(subjects, names, terms):
        found.append(record)
        if target is not None:
            suites.write(target, [record])
    typer.echo(tables.aligned(suites.table(found)))
    if target is not None:
        typer.echo(f"written to {target}")


@app.command()
def chat(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run, finished or not.")],
    step: StepOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which teacher, if there are several; default: the first."),
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat", help="Without or with the chat template; default: like the run's own prompts."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Default: the sampler's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0, help="Default: the sampler's; 0 is greedy.")
    ] = None,
) -> None:
    """Talk to a run's student and its teacher side by side, with the KL to the teacher at each student token.

    Terminals show it as color: none under 0.05 nats, yellow to 0.3, orange to 1, red above. Elsewhere, or
    with NO_COLOR, it is a number. Lines may come from a pipe. /new forgets the conversation, /quit ends it.
    """
    from fopd_cli import chat as talk
    from fopd_cli.export import student_of
    from fopd_cli.runtime.journal.rundir import RunDir

    run = RunDir.open(run_dir)
    recipe = run.load_recipe([])
    names = [t.name for t in recipe.teachers]
    if teacher is not None and teacher not in names:
        raise UserError(f"--teacher: there is no {teacher!r}; there are {', '.join(names)}")
    section = recipe.teachers[names.index(teacher) if teacher else 0]
    both = talk.Chat(
        recipe,
        str(student_of(run, step)),
        section,
        None if raw is None else not raw,
        max_new_tokens,
        temperature,
    )
    if both.teacher is None:
        typer.echo(
            f"{section.name} runs on a server (engine http), which is not asked here; the student talks "
            "alone",
            err=True,
        )
    for text in talk.converse(both, talk.typed(), talk.has_colours()):
        typer.echo(text)


@app.command("doctor")
def doctor_command(
    recipe: RecipeArgument,
    set_: SetOption = None,
    sanity: Annotated[
        bool, typer.Option(help="Also load the student and check that, judged by itself, its loss is 0.")
    ] = True,
) -> None:
    """Find what would go wrong before it does: tokenizers, ends of sequence, templates, lengths, disk,
    memory.

    Prints each finding with its cure; exits 2 if any is an error or a warning.
    """
    from fopd_cli import doctor
    from fopd_cli.inputs import load_inputs, with_engines
    from fopd_cli.recipe import load_recipe
    from fopd_cli.runtime.placing import placed

    parsed = with_engines(load_recipe(recipe, set_ or ()))
    inputs = load_inputs(parsed, placed(parsed))
    typer.echo(f"placement: {inputs.plan.describe()}")
    for section, spec in zip(parsed.teachers, inputs.target_specs, strict=True):
        typer.echo(
            f"{section.name} ({section.engine}): {spec.kind} targets, {spec.nbytes(1)} bytes per token"
        )
    for line in doctor.shown(inputs):
        typer.echo(line)
    found = list(doctor.findings(inputs, Path("runs")))
    if sanity and not any(f.level == "error" for f in found):
        found += [f for f in [doctor.sanity(inputs)] if f]
    for finding in found:
        typer.echo(str(finding))
    if any(f.level != "note" for f in found):
        raise typer.Exit(EXIT_USER)
    typer.echo("no findings")


@app.command("recipe")
def recipe_command(
    section: Annotated[
        str | None,
        typer.Argument(metavar="[SECTION]", help="Of --explain: learner, or a key such as learner.lr."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every key, its type, its default and its meaning.")
    ] = False,
    template: Annotated[bool, typer.Option("--template", help="Print a recipe to fill in.")] = False,
) -> None:
    """Explain recipes: `--explain learner` lists the keys of a section, `--explain` all of them; `--template`
    prints a recipe to fill in.
    """
    if explain == template:
        raise UserError("say what: fopd recipe --explain [SECTION], or fopd recipe --template")
    from fopd_cli.recipe import explain as keys
    from fopd_cli.recipe.meant import meant
    from fopd_cli.recipe.renames import renamed
    from fopd_cli.recipe.template import TEMPLATE

    if template:
        typer.echo(TEMPLATE, nl=False)
        return
    wanted = None if section is None else renamed(section)
    shown = [found for found in keys() if wanted is None or _within(found[0], wanted)]
    if not shown:
        near = meant(str(section), [])
        hint = f"did you mean {near!r}?" if near else "fopd recipe --explain lists all"
        raise UserError(f"--explain: there is no section or key {section!r}; {hint}")
    for key, kind, default, meaning in shown:
        typer.echo(
            f"{key}\n    {kind}; {'required' if default == 'required' else f'default {default}'}\n    "
            f"{meaning}"
        )


def _within(key: str, section: str) -> bool:
    """Whether a key is in a section: `task[math].train` is in task and task[math], and is task.train."""
    plain = "".join(part.partition("]")[2] if i else part for i, part in enumerate(key.split("[")))
    return any(k == section or k.startswith((f"{section}.", f"{section}[")) for k in (key, plain))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the model.")],
    step: StepOption = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the adapter of a LoRA student, in peft's format.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of the weights: bf16, fp16, fp32; auto: as the run sampled and evaluated them.",
        ),
    ] = "auto",
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the Hugging Face hub as well.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="For the model card, such as apache-2.0; --push asks for it."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: for you alone.")] = False,
) -> None:
    """Write a run's student as a Hugging Face model directory, with tokenizer and model card: the best by
    eval.keep_best if the recipe keeps one, else the newest checkpoint's; --step chooses another.
    """
    if dtype not in EXPORTED:
        raise UserError(f"--dtype: {dtype!r} is none of {', '.join(EXPORTED)}")
    if adapter and dtype != "auto":
        raise UserError("--adapter, --dtype: an adapter is kept as it was trained; choose one of them")
    if push is not None and license_ is None:
        raise UserError(
            "--license: a model that others load needs one; take the student's and the teacher's licenses "
            "into account"
        )
    if private and push is None:
        raise UserError("--private: goes with --push")
    if paths.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; give a new directory")
    import torch

    from fopd_cli import card
    from fopd_cli.engines.models import hub
    from fopd_cli.export import export_best, export_student
    from fopd_cli.runtime.journal.rundir import RunDir

    run, chosen = RunDir.open(run_dir), EXPORTED[dtype]
    if push is not None:
        hub.check(push)
    wanted = None if chosen is None else getattr(torch, chosen)
    done = export_best(run, out, wanted) if step is None and not adapter else None
    if done is None:
        done = export_student(run, out, step, adapter, wanted)
    card.write(run_dir, out, done, license_, push)
    typer.echo(f"{out}: {'adapter' if adapter else 'student'} of step {done}")
    if push is not None:
        typer.echo(hub.push(out, push, private, leave_out=["fopd.json"]))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Default: RUN/report.html, or report.html here for several."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve it on this machine instead, updated while the runs go on.")
    ] = False,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port of --watch; 0: any free one.")
    ] = 8642,
) -> None:
    """Write one HTML file about one run, or several side by side: curves, timeline, answers over training,
    advice.

    It needs no network and no other file. The teacher's answers are shown beside the student's if they were
    recorded: fopd eval TEACHER --task RUN/recipe.yaml --out RUN/teacher.jsonl
    """
    from fopd_cli.report.page import write
    from fopd_cli.report.watch import watch as serve

    if watch:
        if out is not None:
            raise UserError("--watch, -o: choose one of them")
        serve(runs, port, typer.echo)
        return
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    size = write(runs, target)
    typer.echo(f"{target}: {size / 1e6:.2f} MB")


def _report(summary: dict[str, Any], path: Path) -> None:
    """Print what was learned and where it is."""
    typer.echo(json.dumps(summary, indent=1))
    typer.echo(
        f"student: {path / 'student'}\nmetrics: {path / 'metrics.jsonl'}\ntimeline: {path / 'trace.json'} "
        "(ui.perfetto.dev)"
    )
    if (path / "tensorboard").is_dir():
        typer.echo(f"curves: tensorboard --logdir {path / 'tensorboard'}")
    if summary["kl_first"] is not None:
        if summary["student_chosen_by"] != "last":
            typer.echo(
                f"student/ is that of step {summary['student_step']}, the best by its "
                f"{summary['student_chosen_by']}"
            )
        for name, own in summary.get("sets", {}).items():
            typer.echo(f"on {name}: {_learned(own)}")
        took = f"{summary['steps']} steps and {summary['wall_seconds']:.0f} s"
        typer.echo(f"{_learned(summary)}, in {took}")


def _learned(figures: dict[str, Any]) -> str:
    """From the first evaluation to the last; a score only where something is graded."""
    pairs = [("score", "score", 3), ("KL to the teacher", "kl", 4)]
    ends = [(label, figures[f"{key}_first"], figures[f"{key}_last"], n) for label, key, n in pairs]
    return ", ".join(f"{w} {a:.{n}f} -> {b:.{n}f}" for w, a, b, n in ends if a is not None and b is not None)


def main() -> NoReturn:
    """Entry point: known errors become one line and an exit code. SIGTERM and SIGHUP end every command as
    Ctrl-C does.
    """
    openmp.spin_briefly()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _signalled)
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(f"error: {error}", EXIT_USER)
    except WorkerError as error:
        _fail(f"error: {error}", EXIT_WORKER)
    except (Interrupted, KeyboardInterrupt) as error:
        _fail(str(error) or "interrupted", EXIT_INTERRUPTED)
    except typer.Abort:
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        # A usage error of click, which can print itself; typer has its own copies of click's classes.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(EXIT_USER)
        if full := disk_error(error):
            _fail(f"error: {full}; free some disk space and try again", EXIT_USER)
        raise
    sys.exit(code if isinstance(code, int) else 0)  # click returns a command's typer.Exit as its code


def _signalled(number: int, frame: object) -> NoReturn:
    if _importing():  # torch's C++ code aborts if Python code that it calls raises
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(EXIT_INTERRUPTED)
    raise Signalled


def _importing() -> bool:
    """Whether a module is being imported; torch takes seconds."""
    specs = [getattr(module, "__dict__", {}).get("__spec__") for module in list(sys.modules.values())]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _fail(message: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
