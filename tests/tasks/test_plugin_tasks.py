"""A task of the user's own: found where it lies, and whatever it does wrong is one line that names the
place.
"""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path

import pytest
from conftest import Fopd, small_recipe, summary

from fopd_cli.errors import UserError
from fopd_cli.recipe import load_recipe
from fopd_cli.runtime.build import task_arguments
from fopd_cli.tasks import load_task

GOOD = """
from pathlib import Path
from fopd_cli.samples import Prompt

class Mine:
    def __init__(self, path, text=""):
        self.lines = Path(path).read_text().split()

    def prompts(self, split):
        lines = self.lines[:4] if split == "eval" else self.lines[4:]
        return [Prompt(i, text=line) for i, line in enumerate(lines)]

    def grade(self, prompt, response):
        {grade}
"""


def put(folder: Path, module: str, source: str) -> None:
    (folder / f"{module}.py").write_text(source)
    (folder / "lines.txt").write_text(" ".join(f"{i}+1=" for i in range(40)))


def recipe(pair: Path, module: str, **more: object) -> dict[str, object]:
    return small_recipe(pair) | {
        "task": {"name": f"{module}:Mine", "options": {"path": "lines.txt", "text": "no file"}, **more}
    }


def test_module_and_files_lie_beside_the_recipe(fopd: Fopd, pair: Path) -> None:
    put(fopd.folder, "beside_the_recipe", GOOD.format(grade="return 1.0"))
    found = load_recipe(fopd.recipe(recipe(pair, "beside_the_recipe")))
    assert found.task.path == str(fopd.folder)  # type: ignore[union-attr]
    assert found.task.options == {"path": str(fopd.folder / "lines.txt"), "text": "no file"}  # type: ignore[union-attr]
    task = load_task(*task_arguments(found))
    assert [p.text for p in task.prompts("eval")] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert not hasattr(task, "episode")
    assert not hasattr(task, "replay")


def test_a_grader_that_raises_ends_the_run_with_a_checkpoint_and_its_line(fopd: Fopd, pair: Path) -> None:
    grade = "return 1.0 if prompt.index != 30 else self.nothing"
    put(fopd.folder, "raises_in_grade", GOOD.format(grade=grade))
    err = fopd(
        "run", fopd.recipe(recipe(pair, "raises_in_grade")), "--run-dir", fopd.folder / "run", code=2
    ).err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (
        "task.name: raises_in_grade:Mine: grade() raised AttributeError: 'Mine' object has no attribute "
        "'nothing'"
    ) in said
    assert (
        f"({fopd.folder / 'raises_in_grade.py'}, line 14); fix this, then continue with: fopd resume" in said
    )
    assert "Traceback" in (fopd.folder / "run" / "logs" / "grader-0.log").read_text()
    put(fopd.folder, "raises_in_grade", GOOD.format(grade="return 1.0"))
    fopd("resume", fopd.folder / "run")
    assert summary(fopd.folder / "run")["steps"] == 4


BODY = (
    "class Mine:\n    def __init__(self): {init}\n    def prompts(self, split): {prompts}\n    def "
    "grade(self, prompt, response): {grade}\n"
)
SOUND = {"init": "pass", "prompts": "return []", "grade": "return 0.0"}


@pytest.mark.parametrize(
    ("part", "code", "message"),
    [
        (
            "init",
            "1 / 0",
            r"its constructor raised ZeroDivisionError: division by zero \(.*wrong_\d+.py, line 2\)",
        ),
        (
            "prompts",
            "return open('nowhere')",
            r"prompts\(\) raised FileNotFoundError.*\(.*wrong_\d+.py, line 3\)",
        ),
        ("prompts", "return 'abc'", r"prompts\(\) returned a str; it must be a list of Prompt"),
        ("prompts", "return [{'text': 'x'}]", r"prompts\(\)\[0\] is a dict; it must be a Prompt"),
        (
            "prompts",
            "import fopd_cli.samples as s; return [s.Prompt(7, text='x')]",
            r"has the index 7; .* position, 0",
        ),
        ("grade", "return None", r"grade\(\) returned None; it must be a number in \[0, 1\] or a Grade"),
        ("grade", "raise KeyError('gold')", r"grade\(\) raised KeyError: 'gold' \(.*wrong_\d+.py, line 4\)"),
    ],
)
def test_whatever_it_does_wrong_is_one_line(tmp_path: Path, part: str, code: str, message: str) -> None:
    module = f"wrong_{zlib.crc32(code.encode())}"  # a module is imported once
    (tmp_path / f"{module}.py").write_text(BODY.format(**{**SOUND, part: code}))

    def use() -> None:
        task = load_task(f"{module}:Mine", {}, str(tmp_path))
        task.prompts("train")
        task.grade(None, "x")  # type: ignore[arg-type]

    with pytest.raises(UserError, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "half_written.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"its import raised SyntaxError: .* \(.*half_written.py, line 1\)"):
        load_task("half_written:Mine", {}, str(tmp_path))
    with pytest.raises(
        UserError, match="No module named 'not_there'; it was found neither beside the recipe, nor in"
    ):
        load_task("not_there:Mine", {}, str(tmp_path))
    (tmp_path / "sound_one.py").write_text(BODY.format(**SOUND))
    with pytest.raises(
        UserError, match=r"task.options: 'sound_one:Mine' does not take these options: .*'colour'"
    ):
        load_task("sound_one:Mine", {"colour": 1}, str(tmp_path))


def test_an_environment_that_raises_is_named_like_all_else(tmp_path: Path) -> None:
    source = BODY.format(**SOUND) + (
        "    def episode(self, prompt, now): return Talk()\n"
        "class Talk:\n    async def observe(self, turn): return turn[99]\n    async def close(self): pass\n"
    )
    (tmp_path / "talks.py").write_text(source)
    task = load_task("talks:Mine", {}, str(tmp_path))
    episode = task.episode(None, 0)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"observe\(\) raised IndexError: .*\(.*talks.py, line 7\)"):
        asyncio.run(episode.observe("short"))
    assert asyncio.run(episode.close()) is None


def test_a_class_that_builds_on_one_of_ours_gives_it_keys_by_keyword(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"question": "{i}+1?", "answer": "{i + 1}"}}\n' for i in range(9))
    )
    (tmp_path / "builds_on_ours.py").write_text(
        "from fopd_cli.tasks.math import Math\n"
        "class Mine(Math):\n"
        "    def __init__(self, rows, **keys):\n"
        "        super().__init__(train=rows, eval=rows, eval_prompts=2, **keys)\n"
    )
    options = {"rows": str(tmp_path / "rows.jsonl"), "template": "Q: {question}"}
    task = load_task("builds_on_ours:Mine", options, str(tmp_path))
    assert [len(task.prompts(split)) for split in ("train", "eval")] == [7, 2]
    assert task.prompts("eval")[0].messages == [{"role": "user", "content": "Q: 0+1?"}]
    with pytest.raises(UserError, match=r"Mine: its constructor raised TypeError: colour: .*line 4\)"):
        load_task("builds_on_ours:Mine", {**options, "colour": 1}, str(tmp_path))
