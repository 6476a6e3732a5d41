"""One self-contained HTML file about one or more runs. Where scripts are off, as in some mail programs, only
the curves are missing.
"""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from fopd_cli import __version__
from fopd_cli.errors import UserError
from fopd_cli.files import write_synced
from fopd_cli.report import suites, texts, timeline
from fopd_cli.report.charts import charts
from fopd_cli.report.reading import Run, read

HERE = Path(__file__).parent
MARK = "<!doctype html><!-- fopd report -->"
SHADES = (0.05, 0.3, 1.0, 3.0)  # nats at which a darker color begins
# The page loads nothing, whatever a model wrote.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def write(paths: Sequence[Path], out: Path) -> int:
    """Write the page of these runs; returns its size in bytes. Raises `UserError`."""
    text = page([read(path) for path in paths])
    try:
        if out.exists() and not out.read_bytes().startswith(MARK.encode()):
            raise UserError(f"-o: {out} exists and is not a fopd report; give another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_synced(out, text)
    except OSError as error:
        raise UserError(f"-o: cannot write {out}: {error.strerror}") from None
    return len(text.encode())


def page(runs: Sequence[Run], watching: bool = False) -> str:
    """The file's text. `watching`: the page polls its server for news, and reloads itself."""
    title = "fopd: " + ", ".join(run.name for run in runs)
    data = json.dumps(charts(runs), separators=(",", ":")).replace("<", "\\u003c")
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = [
        f"<header><h1>{_e(title)}</h1><p class=faint>made {now} by fopd {__version__}</p></header>",
        _section("Results", _results(runs)),
        *(_section(_of("Suites", run, runs), _suites(run)) for run in runs),
        _section("Advice", _advice(runs)),
        _section("Recipes: what is different", _differences(runs)) if len(runs) > 1 else "",
        '<section id="curves"><h2>Curves</h2><div class="bar" id="axis" hidden><button type="button" '
        'data-x="x" class="on">by step</button><button type="button" data-x="t">by time</button><button '
        'type="button" id="log">logarithmic</button></div><noscript><p>The curves need '
        'JavaScript.</p></noscript><div class="grid" id="charts"></div></section>',
        *(_section(_of("Timeline", run, runs), _timeline(run)) for run in runs),
        *(_section(_of("Answers", run, runs), _answers(run)) for run in runs),
        *(_section(_of("Recipe", run, runs), _recipe(run)) for run in runs),
    ]
    watch = "<script>const WATCHING=true;</script>" if watching else "<script>const WATCHING=false;</script>"
    return "".join(
        [
            MARK,
            (
                '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
                'content="width=device-width,initial-scale=1">'
            ),
            (
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="color-scheme" '
                'content="light dark">'
            ),
            f"<title>{_e(title)}</title><style>{_file('vendor/uPlot.min.css')}{_file('page.css')}</style></head><body><main>",
            *body,
            f'</main><p id="told" hidden></p><script type="application/json" id="data">{data}</script>',
            f"<script>{_file('vendor/uPlot.iife.min.js')}</script>{watch}<script>{_file('page.js')}</script></body></html>",
        ]
    )


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _e(text: object) -> str:
    return html.escape(str(text))


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{inside}</section>" if inside else ""


def _of(title: str, run: Run, runs: Sequence[Run]) -> str:
    return title if len(runs) == 1 else f"{title} of {run.name}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are already HTML. With kind `stack`, each row becomes a list on narrow screens."""
    lines = []
    for row in rows:
        cells = zip(head, row, strict=True)
        lines.append(
            "<tr>"
            + "".join(f'<td data-head="{_e(h)}"><span>{cell}</span></td>' for h, cell in cells)
            + "</tr>"
        )
    heads = "".join(f"<th>{_e(h)}</th>" for h in head)
    return f'<div class="wide {kind}"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _results(runs: Sequence[Run]) -> str:
    rows = []
    for n, run in enumerate(runs):
        first = run.evaluations[0] if run.evaluations else {}
        fresh = [s["freshness"] for s in run.steps if s.get("freshness") is not None]
        lags = [s["lag_max"] for s in run.steps if s.get("lag_max") is not None]
        rows.append(
            [
                f'<b class="c{n % 6}">{_e(run.name)}</b>',
                f'<span class="state {run.state}">{run.state}</span>',
                f"{run.step} of {run.planned}",
                _change(first.get("score"), *run.last("score"), 3),
                _change(first.get("kl"), *run.last("kl"), 4),
                f"{sum(fresh) / len(fresh):.2f}" if fresh else "–",
                str(max(lags)) if lags else "–",
                duration(run.seconds),
            ]
        )
    head = ["run", "state", "steps", "score", "KL", "freshness", "largest lag", "time"]
    inside = _table(head, rows, "stack") + _sets(runs)
    taught = [(run.name, texts.teacher_score(run)) for run in runs]
    said = [
        f"{_e(name)}: the teacher's own score is {score:.3f}." for name, score in taught if score is not None
    ]
    return inside + "".join(f"<p>{line}</p>" for line in said)


def _sets(runs: Sequence[Run]) -> str:
    """Results per held-out set, if there are several."""
    rows = []
    for n, run in enumerate(runs):
        for name in run.sets:
            own, first = run.of_set(name), run.of_set(name).evaluations[0]
            mark = " (the run's own)" if name == run.evaluations[-1].get("set") else ""
            rows.append(
                [
                    f'<b class="c{n % 6}">{_e(run.name)}</b>',
                    f"{_e(name)}{mark}",
                    str(first.get("prompts", "–")),
                    _change(first.get("score"), *own.last("score"), 3),
                    _change(first.get("kl"), *own.last("kl"), 4),
                ]
            )
    return (
        "<h3>By held-out set</h3>" + _table(["run", "set", "prompts", "score", "KL"], rows, "stack")
        if rows
        else ""
    )


def _change(first: float | None, last: float | None, error: float | None, digits: int) -> str:
    if last is None:
        return "–"
    margin = f' <span class="faint">± {error:.{digits}f}</span>' if error is not None else ""
    begin = f"{first:.{digits}f} → " if first is not None else ""
    return f"{begin}<b>{last:.{digits}f}</b>{margin}"


def duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"


def _advice(runs: Sequence[Run]) -> str:
    out = []
    for run in runs:
        said = texts.advice(run)
        lines = "".join(f"<li>{_e(line)}</li>" for line in said)
        name = f"<h3>{_e(run.name)}</h3>" if len(runs) > 1 else ""
        out.append(name + (f"<ul>{lines}</ul>" if said else "<p>No warnings.</p>"))
    return "".join(out)


def _differences(runs: Sequence[Run]) -> str:
    rows = [[f"<code>{_e(k)}</code>", *(_e(v) for v in values)] for k, values in texts.differences(runs)]
    return _table(["key", *(run.name for run in runs)], rows) if rows else "<p>Nothing.</p>"


def _suites(run: Run) -> str:
    """What `fopd eval --suite` found."""
    records = suites.newest(run.path)
    if not records:
        return ""
    head, *rows = suites.table(records)
    limits = {r["limit"] for r in records if r["limit"] is not None}
    note = f", only the first {max(limits)} samples of a task" if limits else ""
    return (
        _table(head, ([_e(cell) for cell in row] for row in rows), "stack")
        + f'<p class="faint">Measured by the lm-evaluation-harness{note}. ± is its standard error.</p>'
    )


def _timeline(run: Run) -> str:
    found = timeline.of_run(run.path)
    if not found["drawings"]:
        return ""
    legend = "".join(f'<span><i class="k-{kind}"></i>{kind}</span>' for kind in found["legend"])
    shares = _table(
        ["worker", "idle"], ([_e(worker), f"{share:.0%}"] for worker, share in found["idle"].items())
    )
    pictures = "".join(
        f'<p>{_e(caption)}</p><div class="wide timeline">{svg}</div>' for caption, svg in found["drawings"]
    )
    return (
        f'<div class="legend">{legend}</div>{pictures}{shares}<p class="faint">To zoom into all of it, '
        "open trace.json at ui.perfetto.dev.</p>"
    )


def _answers(run: Run) -> str:
    out, coloured = [], False
    for prompt, shown in texts.answers(run):
        columns = []
        for answer in shown:
            score = (
                f' <span class="score">score {answer.score:.2f}</span>' if answer.score is not None else ""
            )
            cut = ' <span class="score">cut off</span>' if answer.finish == "length" else ""
            far = "" if answer.kl is None else f' <span class="score">KL {answer.kl:.3f}</span>'
            text = _coloured(answer.pieces) + _e(answer.rest) if answer.pieces else _e(answer.text)
            columns.append(f"<div><h4>{_e(answer.who)}{score}{far}{cut}</h4><pre>{text}</pre></div>")
            coloured |= bool(answer.pieces)
        out.append(
            f'<article><pre class="prompt">{_e(prompt)}</pre><div '
            f'class="answers">{"".join(columns)}</div></article>'
        )
    return (_shades() if coloured else "") + "".join(out)


def _coloured(pieces: Sequence[texts.Piece]) -> str:
    """Each token, on a background that shows how far the student was from the teacher there."""
    out = []
    for text, kl, likeliest in pieces:
        if kl is None:
            out.append(_e(text))
            continue
        shade = sum(kl >= limit for limit in SHADES)
        rather = ", ".join(f"{json.dumps(token, ensure_ascii=False)} {p:.0%}" for token, p in likeliest)
        title = f"{kl:.2g} nats" + (f"; the teacher: {rather}" if rather else "")
        out.append(f'<span class="n{shade}" title="{_e(title)}">{_e(text)}</span>')
    return "".join(out)


def _shades() -> str:
    ends = ["under " + f"{SHADES[0]:g}", *(f"from {limit:g}" for limit in SHADES)]
    shades = "".join(f'<span><i class="n{n}"></i>{end}</span>' for n, end in enumerate(ends))
    return (
        "<p>Each token of the student's is coloured by its KL to the teacher there, in nats. Hold the "
        "pointer on one, or tap it, for the number and for what the teacher would rather have written, where "
        f'a run recorded that.</p><div class="legend shades">{shades}</div>'
    )


def _recipe(run: Run) -> str:
    text = (run.path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>recipe.yaml, every default filled in</summary><pre>{_e(text)}</pre></details>"
