"""Whether a patch resolves its instance: the instance's own tests, on a fresh checkout, with the model's
patch and no other trace of the model.

Results are read from pytest's own report file, whose name is random each time, not from what the tests print:
a patch may print anything. The patch still runs in pytest's process, and one that is written to cheat can
replace the report, or pytest. Before you train on the score, look at patches (samples.jsonl).
"""

from __future__ import annotations

import json
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from fopd_cli.errors import UserError
from fopd_cli.tasks.base import Grade
from fopd_cli.tasks.swe.instances import Instance
from fopd_cli.tasks.swe.workspaces import Workspace, write

PYTEST = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -q --tb=no -p no:cacheprovider"
IS_PYTEST = re.compile(r"(?:^|[\s/;&|])(?:pytest|py\.test)(?:\s|$)")
PATCH = ".fopd.patch"
STATUS = re.compile(r"^(PASSED|XFAIL) (\S+)", re.MULTILINE)
IN_DIFF = re.compile(r"^\+\+\+ b/(\S+)", re.MULTILINE)


def judge(instance: Instance, workspace: Workspace, patch: str, wall_s: float) -> Grade:
    """Score 1 if all FAIL_TO_PASS and PASS_TO_PASS tests pass with the patch.

    Metrics: `submitted` (there is a patch), `applied`, and for those that apply `regression`: a test that
    passed before fails now (the paper's post-patch regression). Tests that the patch touches are restored
    first.
    """
    if not patch.lstrip().startswith("diff "):
        return Grade(0.0, {"submitted": 0.0})
    write(workspace, PATCH, patch)
    if workspace.run(f"git apply --whitespace=nowarn {PATCH}").code != 0:
        return Grade(0.0, {"submitted": 1.0, "applied": 0.0})
    # A single command from here on, since each one starts a sandbox.
    tests = [*instance.fail_to_pass, *instance.pass_to_pass]
    own = dict.fromkeys(
        [*(t.split("::")[0] for t in tests), *IN_DIFF.findall(instance.test_patch), "conftest.py"]
    )
    steps = [f"git checkout -q HEAD -- {shlex.quote(path)} 2>/dev/null" for path in own]
    if instance.test_patch:
        write(workspace, PATCH, instance.test_patch)
        steps.append(f"git apply --whitespace=nowarn {PATCH}")
    files = " ".join(shlex.quote(f) for f in dict.fromkeys(t.split("::")[0] for t in tests))
    command, report = instance.test_command or PYTEST, None
    if IS_PYTEST.search(command):
        report = f".fopd-{secrets.token_hex(12)}.xml"
        command += f" -o junit_family=xunit1 --junitxml={report}"
    outcome = workspace.run("; ".join([*steps, f"{command} {files}"]), wall_s)
    if report is None:  # another runner: only its output is known
        passed = {name for _, name in STATUS.findall(outcome.output)}
    else:
        passed = passed_tests(workspace.read(report) or "")
    kept = all(t in passed for t in instance.pass_to_pass)
    resolved = kept and all(t in passed for t in instance.fail_to_pass)
    return Grade(float(resolved), {"submitted": 1.0, "applied": 1.0, "regression": float(not kept)})


def passed_tests(report: str) -> set[str]:
    """The node ids of tests that passed, or failed as expected, in a pytest report (JUnit XML, family
    xunit1); a test that is listed twice must have passed both times. Empty if the text is not a report.
    """
    passed, failed = set[str](), set[str]()
    try:
        cases = ElementTree.fromstring(report).iter("testcase")
    except ElementTree.ParseError:
        return set()
    for case in cases:
        file, path = case.get("file") or "", case.get("classname") or ""
        module = file.removesuffix(".py").replace("/", ".")
        classes = [part for part in path.removeprefix(module).split(".") if part]
        name = "::".join([file, *classes, case.get("name") or ""])
        bad = [
            e
            for e in case
            if e.tag in ("failure", "error") or (e.tag == "skipped" and e.get("type") != "pytest.xfail")
        ]
        (failed if bad else passed).add(name)
    return passed - failed


def harness(instance: Instance, patch: str, dataset: str, split: str) -> Grade:
    """Grade by the official harness: the `swebench` package and Docker. Not yet run: none of our machines has
    Docker.
    """
    if not patch.strip():
        return Grade(0.0, {"submitted": 0.0})
    with tempfile.TemporaryDirectory(prefix="fopd-swebench-") as folder:
        prediction = {"instance_id": instance.id, "model_name_or_path": "fopd", "model_patch": patch}
        (Path(folder) / "predictions.json").write_text(json.dumps([prediction]))
        command = [
            sys.executable,
            "-m",
            "swebench.harness.run_evaluation",
            "-d",
            dataset,
            "-s",
            split,
            "-i",
            instance.id,
            "-p",
            "predictions.json",
            "-id",
            "fopd",
            "--max_workers",
            "1",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        report = Path(folder) / "logs" / "run_evaluation" / "fopd" / "fopd" / instance.id / "report.json"
        if not report.is_file():
            if "No module named swebench" in done.stderr:
                raise UserError("task.grader: swebench needs its package: pip install swebench, and Docker")
            return Grade(0.0, {"submitted": 1.0, "applied": 0.0})
        found = json.loads(report.read_text())[instance.id]
    broken = found.get("tests_status", {}).get("PASS_TO_PASS", {}).get("failure", [])
    return Grade(
        float(found["resolved"]), {"submitted": 1.0, "applied": 1.0, "regression": float(bool(broken))}
    )
