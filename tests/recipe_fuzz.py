"""Mutates recipes and does with each what `fopd run --dry-run` does; run as a program it fuzzes one recipe.

    python tests/recipe_fuzz.py RECIPE COUNT SEED

Prints one line a failure: anything but a `UserError`, an error that is not one short line, a case that takes
seconds. The memory of the process is limited, so that one that takes gigabytes is a `MemoryError`, a failure
like all others.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fopd_cli.errors import UserError
from fopd_cli.recipe import dump_recipe, load_recipe
from fopd_cli.runtime.placement import place

SECONDS = 20.0  # ten times what a case may take: the machine may be busy
GIGABYTE = 1 << 30
LONGEST_ERROR = 1500

LEAVES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    10**9,
    10**9 + 1,
    10**18,
    10**30,
    -(10**30),
    2**63,
    10**4000,
    0.0,
    -0.5,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    " ",
    "x",
    "x" * 5_000,
    "x" * 150_000,
    "ü" * 300,
    "\u202e\u0000\n\t",
    "🙂",
    "~nobody/x",
    "/" * 5_000,
    "../" * 2_000,
    "hf:",
    "a/b/c",
    "none",
    "null",
    "1e5",
    "0x10",
    "1:30",
    "nan",
    "[1, 2",
    "{a",
    "${HOME}",
    "%s{}{0}{question!r}",
    [],
    [1],
    [[]],
    {},
    {"name": 1},
    {"name": [1]},
    [{}],
    [None, None],
    {"a": {"b": {"c": [1, {"d": []}]}}},
    list(range(5_000)),
]
TEXTS = [
    "!!python/object:os.system x",
    "!!python/name:os.system",
    "!!binary aGFsbG8=",
    "!!binary x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!tag x",
    "2024-01-01",
    "2024-13-45",
    "2024-01-01 25:61:00",
    "&a [*a]",
    "&a {b: *a}",
    "*nothing",
    "&a [1, &b [*a, *a]]",
    "? [1, 2] : 3",
    "{1: 2}",
    "{null: 1}",
    "{[1]: 2}",
    "{? {a: 1} : 2}",
    "<<: 3",
    "{<<: {a: 1}}",
    "0x" + "f" * 6_000,
    "9" * 6_000,
    "0b" + "1" * 9_000,
    "1e999999",
    ".nan",
    ".inf",
    '"\\ud800"',
    '"\\ud800": 1',
    '"\\0"',
    "[" * 3_000,
    "{a: " * 3_000,
    "- " * 3_000,
    "'",
    '"',
    "|",
    ">",
    "@",
    "`",
    "%",
    "---\n---",
    "\t",
    "\ufeff",
    "\x85",
    "\u2028",
    "'''",
    "[*a]",
    "&a " * 3,
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!null x",
    "!!timestamp x",
    "!!map []",
    "!!seq {}",
    "&a [x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b,*b,*b]",
]
MARK = "MUTATED-HERE"


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in children:
        yield from places(inner, (*way, key))


def put(root: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    node = root
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = value
    return root


def get(root: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        root = root[key]
    return root


def mutated(whole: dict[str, Any], rng: random.Random) -> tuple[str, list[str]]:
    """(a recipe's text, overrides): one to three changes of a recipe that has every key."""
    recipe: Any = copy.deepcopy(whole)
    text: str | None = None
    overrides: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        ways = list(places(recipe))
        way = rng.choice(ways)
        kind = rng.choice(
            ["leaf", "leaf", "leaf", "leaf", "text", "text", "key", "swap", "drop", "many", "set", "list"]
        )
        if kind == "leaf":
            recipe = put(recipe, way, copy.deepcopy(rng.choice(LEAVES)))
        elif kind == "text":
            recipe, text = put(recipe, way, MARK), rng.choice(TEXTS)
        elif kind == "swap":
            recipe = put(recipe, way, copy.deepcopy(get(recipe, rng.choice(ways))))
        elif kind == "list":
            recipe = put(recipe, way, [copy.deepcopy(get(recipe, way))] * rng.choice([1, 2, 3, 200]))
        elif kind == "set":
            key = ".".join(map(str, way)) or rng.choice(
                ["", ".", "a..b", "teacher.9", "teacher.²", "=", "x" * 5_000]
            )
            value = rng.choice(TEXTS) if rng.random() < 0.5 else _text(rng.choice(LEAVES))
            overrides.append(f"{key}{rng.choice(['', '.x', '.0', '..'])}={value}")
        elif isinstance(node := get(recipe, way), dict) and kind == "key":
            node[
                rng.choice(
                    [
                        "x",
                        "",
                        "math",
                        "plugin",
                        "tool",
                        "name",
                        "lr ",
                        "model",
                        "0",
                        "ü",
                        "x" * 5_000,
                        "\n",
                        "a.b",
                    ]
                )
            ] = rng.choice(LEAVES)
        elif isinstance(node, dict) and kind == "many":
            node.update({f"{rng.random()}": i for i in range(rng.choice([5, 500, 5_000]))})
        elif way and kind == "drop":
            del get(recipe, way[:-1])[way[-1]]
        if not isinstance(recipe, dict | list):
            break
    written = _text(recipe)
    if text is not None:
        written = written.replace(MARK, text) if rng.random() < 0.8 else written.replace(f'"{MARK}"', text)
    return written, overrides


def _text(value: Any) -> str:
    """JSON, which is YAML, too, and quickly written; with Python's names for numbers that JSON has not, or
    YAML's.
    """
    try:
        return json.dumps(value, ensure_ascii=False).replace("NaN", ".nan").replace("Infinity", ".inf")
    except ValueError:  # too long a number
        return hex(value) if isinstance(value, int) else "0x" + "f" * 5_000


def dry_run(path: Path, overrides: list[str], again: Path) -> None:
    """All that `fopd run --dry-run` does, on boxes of four sizes; and the dump is the same recipe."""
    recipe = load_recipe(path, overrides)
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe, "the dump is another recipe"
    for devices in (0, 1, 2, 8):
        try:
            place(recipe, devices, cores=16).describe()
        except UserError as error:
            check(error)


def check(error: UserError) -> None:
    text = str(error)
    assert len(text) <= LONGEST_ERROR, f"an error of {len(text)} characters"
    assert "\n" not in text, "an error of several lines"
    text.encode()


def fuzz(path: Path, count: int, seed: int) -> Iterator[str]:
    """Failures, each with what is needed to see it again."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    full = load_recipe(path).model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder:
        written, again = Path(folder) / "r.yaml", Path(folder) / "again.yaml"
        for number in range(count):
            rng = random.Random(f"{path.name}/{seed}/{number}")
            text, overrides = mutated(rng.choice([raw, full]), rng)
            written.write_text(text, encoding="utf-8", errors="surrogatepass")
            began = time.monotonic()
            problem = None
            try:
                dry_run(written, overrides, again)
            except UserError as error:
                try:
                    check(error)
                except (AssertionError, UnicodeError) as wrong:
                    problem = repr(wrong)
            except Exception:
                problem = traceback.format_exc()[-900:]
            if time.monotonic() - began > SECONDS:
                problem = f"took {time.monotonic() - began:.1f} s"
            if problem is not None:
                yield (
                    f"case {number} of {path.name}, seed {seed}: "
                    f"{problem}\n{text[:200]}\n{[o[:200] for o in overrides]}"
                )


def main(recipe: str, count: str, seed: str) -> int:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + GIGABYTE, held + GIGABYTE))
    failures = list(fuzz(Path(recipe), int(count), int(seed)))
    print("\n\n".join(failures[:10]))
    return min(len(failures), 100)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
