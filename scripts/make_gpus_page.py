"""docs/gpus.md: memory and seconds by role of every shipped recipe, from the memory model and the time model.

    python scripts/make_gpus_page.py            write it
    python scripts/make_gpus_page.py --print    show it

No figure on the page is typed by hand, and none was measured on a GPU.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fopd_cli.engines.learner import lora  # noqa: E402
from fopd_cli.engines.models import hf  # noqa: E402
from fopd_cli.engines.models.shapes import Shapes, shapes  # noqa: E402
from fopd_cli.errors import UserError  # noqa: E402
from fopd_cli.plan import hardware  # noqa: E402
from fopd_cli.plan.forecast import Setting, forecast, guessed  # noqa: E402
from fopd_cli.plan.lengths import log_normal  # noqa: E402
from fopd_cli.plan.prompts import Prompts  # noqa: E402
from fopd_cli.recipe import Recipe, load_recipe  # noqa: E402
from fopd_cli.runtime.build import add_adapters  # noqa: E402
from fopd_cli.runtime.memory import model as memory  # noqa: E402
from fopd_cli.runtime.placement import Plan, place  # noqa: E402
from fopd_cli.runtime.time_model import Device  # noqa: E402

PAGE = ROOT / "docs" / "gpus.md"
DEVICE_BYTES = 80 * 10**9
PROMPT = 512  # tokens of the longest prompt
ON_GPUS = ("one-gpu", "one-gpu-lora", "qwen-7b-from-32b", "paper-reasoning", "paper-tools", "paper-swe")
BOXES = {"one-gpu": 1, "one-gpu-lora": 1}
TEXT = ROOT / "scripts" / "gpus_page.md"
CONFIGURATIONS = ROOT / "scripts" / "published_models.json"


@functools.cache
def shapes_of(name: str) -> Shapes:
    return shapes(published(name))


def published(name: str) -> Any:
    """The configuration of a hub model, from its published numbers."""
    from transformers import CONFIG_MAPPING

    values = dict(json.loads(CONFIGURATIONS.read_text())[name])
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def models_of(recipe: Recipe) -> memory.Models:
    """Shapes of a recipe's models, whether they are on this machine or not."""
    trainable = None
    if recipe.student.lora is not None:
        empty = hf.empty_model(published(recipe.student.model))
        add_adapters(empty, recipe, hf.DTYPES["fp32"])
        trainable = sum(tensor.numel() for _, tensor in lora.adapters(empty))
    longest = PROMPT + recipe.sampler.max_new_tokens
    teachers = {t.name: shapes_of(t.model) for t in recipe.teachers}
    return memory.Models(shapes_of(recipe.student.model), teachers, longest, longest, trainable)


def plan_of(recipe: Recipe, models: memory.Models, devices: int) -> Plan:
    return place(recipe, devices, cores=64, memory=memory.Fit(recipe, models, DEVICE_BYTES))


def gb(nbytes: float) -> str:
    return f"{nbytes / memory.GB:.1f}"


def row_of(name: str, worker: memory.Worker, count: int) -> str:
    use = worker.use
    label = f"{count} x {worker.spec.role}" + (" (a replica each)" if worker.spec.whole else "")
    cache = f"; its cache holds {use.rows:.0f} samples of full length" if use.rows else ""
    spare = 1 - use.peak / DEVICE_BYTES
    parts = memory.largest(use.parts, 5)
    return f"| {name} | {label} | {gb(use.peak)} | {spare:.0%} | {parts}{cache} |"


def table(chosen: dict[str, tuple[Recipe, memory.Models, Plan]]) -> list[str]:
    lines = [
        "| recipe | processes | GB a device at the peak | to spare | largest parts, GB |",
        "|---|---|---|---|---|",
    ]
    for name, (recipe, models, plan) in chosen.items():
        found = memory.workers(recipe, plan, models, DEVICE_BYTES)
        title = f"{name}, {plan.mode}"
        for role in ("sampler", "teacher", "learner"):
            own = [w for w in found if w.spec.role == role]
            lines.append(row_of(title, own[0], len(own)))
            title = ""
        worst = max(memory.demands(plan, found), key=lambda d: d.nbytes)
        spare = 1 - worst.nbytes / DEVICE_BYTES
        lines.append(
            f"| | **the fullest device** ({worst.who}) | **{gb(worst.nbytes)}** | **{spare:.0%}** | |"
        )
        if plan.exclusive:
            lines.append(f"| | {plan.describe_turns()} | | | |")
    return lines


def seconds(chosen: dict[str, tuple[Recipe, memory.Models, Plan]]) -> list[str]:
    lines = [
        "| recipe | tokens a response | sampling | judging | learning | publishing | a step | 400 steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    prompts = Prompts(log_normal(PROMPT / 2, PROMPT, "assumed"), held_out=0)
    for name, (recipe, models, plan) in chosen.items():
        box = hardware.chosen("h100", BOXES.get(name, 8), DEVICE_BYTES / memory.GB, bf16=True)
        found = forecast(recipe, Setting(box, models, guessed(recipe), prompts), plan)
        o = found.outcome
        busy = [o.busy[role] * o.seconds for role in ("sampler", "teacher", "learner")]
        cells = [f"{s:.1f} s" for s in (*busy, found.costs.publish, o.seconds)]
        response = f"{found.setting.responses.mean:,.0f}"
        lines.append(f"| {name} | {response} | {' | '.join(cells)} | {400 * o.seconds / 3600:.1f} h |")
    return lines


def boxes() -> list[str]:
    """What `placement.mode: auto` does with each recipe's pair on other boxes."""
    lines = ["| recipe | 1 | 2 | 4 | 8 |", "|---|---|---|---|---|"]
    for name in ON_GPUS:
        cells = []
        for devices in (1, 2, 4, 8):
            recipe = load_recipe(
                ROOT / "recipes" / f"{name}.yaml",
                ["placement.mode=auto", *(f"placement.{r}=null" for r in ("sampler", "teacher", "learner"))],
            )
            models = models_of(recipe)
            try:
                plan = plan_of(recipe, models, devices)
            except UserError as error:
                cells.append(str(error))
                continue
            worst = max(
                memory.demands(plan, memory.workers(recipe, plan, models, DEVICE_BYTES)),
                key=lambda d: d.nbytes,
            )
            fits = "" if worst.nbytes <= DEVICE_BYTES else ", **does not fit**"
            cells.append(f"{plan.mode}, {gb(worst.nbytes)} GB{fits}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    chosen = {}
    for name in ON_GPUS:
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        models = models_of(recipe)
        chosen[name] = (recipe, models, plan_of(recipe, models, BOXES.get(name, 8)))
    d = Device()
    text = TEXT.read_text()
    for mark, lines in {"MEMORY": table(chosen), "SECONDS": seconds(chosen), "BOXES": boxes()}.items():
        text = text.replace(f"<!-- {mark} -->", "\n".join(lines))
    values = {
        "prompt": str(PROMPT),
        "flops": f"{d.flops / 1e12:.0f}",
        "bandwidth": f"{d.bandwidth / 1e12:.2f}",
        "training": f"{d.training:.0%}",
        "judging": f"{d.judging:.0%}",
        "reading": f"{d.reading:.0%}",
        "host": f"{d.host / 1e9:.0f}",
        "context": gb(memory.CONTEXT),
        "ranks": gb(memory.RANKS),
        "graphs": gb(memory.GRAPHS),
        "asleep": gb(memory.ASLEEP),
    }
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page())
    else:
        PAGE.write_text(page())
