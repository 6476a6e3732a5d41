"""A prompt's way through the program, counted: from its draw to the optimizer step, in all processes.

Runs `fopd run` with one prompt, one sample and one step, and notes each function of fopd_cli at its first
call that is handed the prompt or what became of it: as an argument, in a list or dict, or in a message. Such
a function is a stop; stops are in the order of these calls.

    python scripts/prompts_way.py [TREE]      another checkout of fopd, to compare with
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = {
    "student": {"model": str(ROOT / "recipes/tiny/student")},
    "teacher": {"model": str(ROOT / "recipes/tiny/teacher"), "engine": "transformers"},
    "task": {"name": "arithmetic", "horizon": 2, "train_prompts": 1, "eval_prompts": 1},
    "sampler": {"engine": "transformers", "max_new_tokens": 4},
    "learner": {"steps": 1, "batch_samples": 1},
    "freshness": {"policy": "sync"},
}
# Every process of the run imports this at its start, as its `sitecustomize`.
PROFILER = """
import dataclasses, os, sys, threading, time

NAMES = {"Prompt", "SampleId", "Ticket", "Request", "Rollout", "TeacherTargets", "Sample", "MicroBatch"}
PACKAGE = os.environ["FOPD_WAY_TREE"] + "/fopd_cli/"
OUT = os.open(os.environ["FOPD_WAY_OUT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
seen = set()


def carries(value, depth=3):
    if type(value).__name__ in NAMES:
        return True
    if not depth:
        return False
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(carries(v, depth - 1) for v in value[:2])
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("fopd_cli.runtime"):
        return any(carries(v, depth - 1) for v in vars(value).values())
    return False


def note(frame, event, _):
    code = frame.f_code
    if event != "call" or code in seen or not code.co_filename.startswith(PACKAGE):
        return
    names = code.co_varnames[: code.co_argcount]
    if code.co_name[0] != "<" and any(carries(frame.f_locals.get(n)) for n in names if n != "self"):
        seen.add(code)
        stop = f"{time.monotonic_ns()} {code.co_filename[len(PACKAGE):]} {code.co_qualname}\\n"
        os.write(OUT, stop.encode())


threading.setprofile(note)
sys.setprofile(note)
"""


def stops(tree: Path, depth: str) -> list[tuple[str, str]]:
    """(file, function) in the order of their first calls, whatever the process."""
    with tempfile.TemporaryDirectory() as folder:
        out, recipe = Path(folder) / "way", Path(folder) / "recipe.yaml"
        (Path(folder) / "sitecustomize.py").write_text(PROFILER)
        recipe.write_text(json.dumps({**RECIPE, "schedule": {depth: 0}}))
        environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}:{tree}",
            "FOPD_WAY_TREE": str(tree),
            "FOPD_WAY_OUT": str(out),
        }
        command = [sys.executable, "-m", "fopd_cli", "run", str(recipe), "--run-dir", f"{folder}/run"]
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
        lines = sorted(line.split(maxsplit=2) for line in out.read_text().splitlines())
    return list(dict.fromkeys((file, name) for _, file, name in lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--depth", default="max_lag", help="the key of schedule for the largest lag")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    found = stops(args.tree.resolve(), args.depth)
    visits = [file for file, _ in groupby(found, key=lambda stop: stop[0])]
    for file, name in found if args.list else ():
        print(f"{file:45} {name}")
    print(f"{len(found)} stops in {len(set(visits))} files, {len(visits) - 1} changes of file")
    for file in ("runtime/conductor.py", "schedule.py"):
        print(f"{file} is entered {sum(v.endswith(file) for v in visits)} times")


if __name__ == "__main__":
    main()
