"""Small repositories with one wrong operator each: the whole path of a coding agent on a CPU.

    a.py                      tests/test_all.py                  the problem
    def mul(x,y):             def test_mul():                    mul(7,3) is 10, not 21
        return x+y                assert mul(7,3) == 21

One or two modules with two functions each. Every function has a test; the wrong one's fails, the others'
pass.
"""

from __future__ import annotations

import random

from fopd_cli.tasks.swe.instances import Instance

OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "//", "mod": "%", "or_": "|", "xor": "^"}
MODULES = ("a.py", "b.py")
TESTS = "tests/test_all.py"


def instances(split: str, count: int, seed: int, held_out: int) -> list[Instance]:
    """Distinct problems; the first `held_out` of the stream are the held-out ones, whatever `count` is."""
    rng, found = random.Random(f"swe/{seed}"), dict[str, Instance]()
    wanted = held_out if split == "eval" else held_out + count
    while len(found) < wanted:
        made = instance(rng)
        found.setdefault(made.id, made)
    every = list(found.values())
    return every[:held_out] if split == "eval" else every[held_out:]


def instance(rng: random.Random) -> Instance:
    """One random instance."""
    names = rng.sample(sorted(OPERATORS), 2 * rng.randint(1, len(MODULES)))
    broken, x, y = rng.choice(names), rng.randint(2, 99), rng.randint(2, 99)
    right = _value(OPERATORS[broken], x, y)
    wrong = rng.choice([op for op in OPERATORS.values() if _value(op, x, y) != right])
    used = {name: wrong if name == broken else OPERATORS[name] for name in names}
    modules = [names[i : i + 2] for i in range(0, len(names), 2)]
    files = {
        module: "\n\n".join(f"def {name}(x,y):\n    return x{used[name]}y\n" for name in own)
        for module, own in zip(MODULES, modules, strict=False)
    }
    imports = [
        f"from {m.removesuffix('.py')} import {', '.join(own)}"
        for m, own in zip(MODULES, modules, strict=False)
    ]
    tests = [
        f"def test_{name}():\n    assert {name}({x},{y}) == {_value(OPERATORS[name], x, y)}\n"
        for name in names
    ]
    files[TESTS] = "\n".join(imports) + "\n\n\n" + "\n\n".join(tests)
    files["conftest.py"] = ""  # so that pytest finds the modules
    return Instance(
        id=f"{'-'.join(names)}/{broken}{wrong}/{x}/{y}",
        problem=f"{broken}({x},{y}) is {_value(wrong, x, y)}, not {right}",
        fail_to_pass=(f"{TESTS}::test_{broken}",),
        pass_to_pass=tuple(f"{TESTS}::test_{name}" for name in names if name != broken),
        files=files,
    )


LOOK = "grep -A1 def [ab].py /dev/null"  # with a second file, grep names the file of each match
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && git diff"


def scripted(made: Instance) -> list[tuple[str, str]]:
    """An expert's commands, and what each prints: look, fix, submit (whose output is never shown)."""
    broken, files = made.problem.split("(")[0], made.files or {}
    shown = []
    for module in (m for m in MODULES if m in files):
        lines = files[module].splitlines()
        for number, line in enumerate(lines):
            if line.startswith("def "):
                shown.append(f"{module}:{line}\n{module}-{lines[number + 1]}\n")
    mend = f"sed -i '/ {broken}(/{{n;s#x.*#x{OPERATORS[broken]}y#}}' [ab].py"
    return [(LOOK, "--\n".join(shown)), (mend, ""), (SUBMIT, "")]


def _value(operator: str, x: int, y: int) -> int:
    return int(eval(f"{x} {operator} {y}"))
