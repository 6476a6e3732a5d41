"""Hostile code in the sandbox: each attack ends with a clear outcome, the host is unharmed, nothing is
left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import wait_for
from tool_kit import PROBLEM

from fopd_cli.sandbox import bubblewrap
from fopd_cli.sandbox.interpreter import PythonSession
from fopd_cli.sandbox.limits import Limits, Outcome
from fopd_cli.sandbox.process import run

LIMITS = Limits(wall_s=5, cpu_s=3, memory_mb=128, processes=16, output_kb=16, disk_mb=8)


pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No process that a test started outlives it, and (as root, which can tell) no file of the sandbox's user
    appears.
    """
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    files = files_of_nobody()
    yield
    wait_for(
        lambda: {p.pid for p in psutil.Process().children(recursive=True)} <= before,
        "all processes to end",
        5,
    )
    assert files_of_nobody() <= files


def files_of_nobody() -> set[str]:
    """Where anyone may write; other programs come and go there too."""
    found = set()
    for folder in ("/tmp", "/dev/shm", "/var/tmp"):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_uid == bubblewrap.NOBODY:
                    found.add(entry.path)
    return found


def python(source: str, limits: Limits = LIMITS) -> Outcome:
    """One snippet in a session of its own."""

    async def go() -> Outcome:
        session = PythonSession(limits)
        try:
            return await session.execute(source)
        finally:
            await session.close()

    return asyncio.run(go())


def snippets(*sources: str) -> list[Outcome]:
    async def go() -> list[Outcome]:
        session = PythonSession(LIMITS)
        try:
            return [await session.execute(s) for s in sources]
        finally:
            await session.close()

    return asyncio.run(go())


def bash(command: str, limits: Limits = LIMITS, workspace: Path | None = None) -> Outcome:
    return asyncio.run(run(["bash", "-c", command], limits, workspace))


# ---- what it is for ----------------------------------------------------------------------------------------


def test_an_interpreter_keeps_its_state() -> None:
    found = snippets(
        "x = 3\nx + 1", "print('a', x)", "def f(n):\n    return n * x\nf(7)", "1/0", "x", "print(", "None"
    )
    assert [o.output for o in found[:3]] == ["4\n", "a 3\n", "21\n"]
    assert "ZeroDivisionError" in found[3].output
    assert "line 1" in found[3].output
    assert found[4].output == "3\n"
    assert "SyntaxError" in found[5].output
    assert found[6].output == ""
    assert [o.code for o in found] == [0, 0, 0, 1, 0, 1, 0]
    assert {o.reason for o in found} == {"exit"}


def test_sessions_run_side_by_side_and_know_nothing_of_each_other() -> None:
    """Twenty at once, each asleep for two seconds, take not much longer than one."""

    async def one(number: int) -> str:
        session = PythonSession(replace(LIMITS, wall_s=30))
        await session.execute(f"import time; mine = {number}; open('/tmp/mine', 'w').write(str(mine))")
        found = await session.execute(
            "time.sleep(2); print(mine, open('/tmp/mine').read(), len(__import__('os').listdir('/tmp')))"
        )
        await session.close()
        return found.output

    async def go() -> list[str]:
        return await asyncio.gather(*(one(i) for i in range(20)))

    began = time.monotonic()
    assert asyncio.run(go()) == [f"{i} {i} 1\n" for i in range(20)]
    assert time.monotonic() - began < 30


def open_to_all(folder: Path) -> None:
    """Let the sandbox's user reach it: pytest's folders are private."""
    for one in (folder, *folder.parents):
        if not one.stat().st_mode & stat.S_IXOTH:
            one.chmod(0o755)


def test_a_command_in_a_workspace(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "a.txt").write_text("hello\n")
    open_to_all(tmp_path)
    bubblewrap.own(work)
    done = bash("pwd; cat a.txt; echo more >> a.txt; mkdir b; exit 7", workspace=work)
    assert done.output == "/workspace\nhello\n"
    assert (done.reason, done.code) == ("exit", 7)
    assert (work / "a.txt").read_text() == "hello\nmore\n"
    assert (work / "b").is_dir()


# ---- attacks -----------------------------------------------------------------------------------------------


def test_a_fork_bomb_meets_the_limit_on_processes() -> None:
    source = (
        "import os\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            import "
        "time; time.sleep(60)\n        n += 1\nexcept OSError as e:\n    print(n, e)"
    )
    done = python(source)
    assert "Resource temporarily unavailable" in done.output
    assert 5 < int(done.output.split()[0]) <= LIMITS.processes
    done = bash(":(){ :|:& };: ; sleep 60")
    assert done.reason in ("timeout", "output", "exit")
    assert done.seconds < LIMITS.wall_s + 2


def test_memory_is_bounded_for_each_process_and_for_all_together() -> None:
    done = python("x = bytearray(100 << 30)")
    assert "MemoryError" in done.output
    hungry = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = "
        "bytearray(os.urandom(1 << 20)) * 60\n        time.sleep(60)\ntime.sleep(60)"
    )
    done = python(hungry)
    assert done.reason == "memory"
    assert done.seconds < 4


def test_memory_that_a_fork_shares_counts_once() -> None:
    source = (
        "import os, time\nx = bytearray(os.urandom(1 << 20)) * 50\nfor _ in range(4):\n    if os.fork() == "
        "0:\n        time.sleep(0.5)\n        os._exit(0)\nfor _ in range(4):\n    os.wait()\nprint('done')"
    )
    assert python(source).output == "done\n"


def test_endless_output_is_cut_off() -> None:
    done = python("while True:\n    print('x' * 1000)")
    assert done.reason == "output"
    assert len(done.output) == LIMITS.output_kb << 10
    done = bash("yes")
    assert done.reason == "output"


def test_time_is_bounded() -> None:
    done = python("import time\nprint('before', flush=True)\ntime.sleep(60)")
    assert (done.reason, done.output) == ("timeout", "before\n")
    assert LIMITS.wall_s <= done.seconds < LIMITS.wall_s + 5
    busy = python("while True:\n    pass", Limits(wall_s=20, cpu_s=1, memory_mb=128))
    assert busy.reason == "died"  # the kernel ends it at its CPU limit
    assert busy.seconds < 15


def test_nothing_outside_can_be_written() -> None:
    for path in (
        "/x",
        "/dev/x",
        "/usr/x",
        "/opt/x",
        "/opt/packages/x",
        "/etc/x",
        "/proc/sys/kernel/hostname",
        "/workspace/x",
        "/dev/shm/../../x",
    ):
        done = python(f"open({path!r}, 'w')")
        assert any(word in done.output for word in ("Read-only", "Permission denied", "No such file")), (
            path,
            done,
        )
    mount = "import ctypes\nprint(ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None))"
    assert python(mount).output == "-1\n"


def test_the_disk_is_bounded() -> None:
    """Also what a decompression bomb would write."""
    source = (
        "import zlib\nbomb = zlib.compress(bytes(20 << 20))\nopen('/tmp/a', "
        "'wb').write(zlib.decompress(bomb))"
    )
    assert any(word in python(source).output for word in ("No space left", "File too large"))
    for folder in ("/tmp", "/dev/shm"):
        many = python(f"for i in range(100):\n    open(f'{folder}/{{i}}', 'wb').write(bytes(1 << 20))")
        assert "No space left" in many.output


def test_secrets_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "very-secret-value")
    (tmp_path / "weights").write_text("weights")
    (tmp_path / "link").symlink_to("/etc/shadow")
    source = (
        "import glob, os\nprint(dict(os.environ))\nfor f in glob.glob('/proc/*/environ') + "
        "['/etc/shadow', '/etc/passwd', "
        f"{str(tmp_path / 'weights')!r}, {str(Path.home() / '.bashrc')!r}, {str(tmp_path / 'link')!r}]:\n"
        "    try:\n        print(f, open(f, 'rb').read())\n    except OSError as e:\n        print(f, e)\n"
        "print(os.path.exists('/root'), os.path.exists('/home'), os.path.exists('/work'), "
        "len(os.listdir('/proc')) < 200)"
    )
    done = python(source)
    assert "very-secret-value" not in done.output
    assert "b'weights'" not in done.output
    assert "root:" not in done.output
    assert "False False False True" in done.output


def test_a_link_out_of_the_workspace_leads_nowhere(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (work / "link").symlink_to(secret)
    open_to_all(tmp_path)
    bubblewrap.own(work)
    done = bash("cat link ../secret; ln -s / out; ls out; echo new > link", workspace=work)
    assert "secret\n" not in done.output.replace("../secret", "")
    assert secret.read_text() == "secret"
    assert secret.stat().st_uid == os.getuid()


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = python(
            "import socket\nfor host in ('127.0.0.1', '10.0.0.1', '8.8.8.8'):\n    try:\n        "
            f"socket.create_connection((host, {port}), 1)\n"
            "        print('connected')\n    except OSError as e:\n        print(e)"
        )
    assert "connected" not in done.output
    assert done.output.count("\n") == 3


def test_it_cannot_reach_its_parents() -> None:
    found = snippets(
        "import os, signal\nprint(os.getpid() < 10, os.getppid() < 10)",
        "os.kill(1, signal.SIGKILL)",
        "print('still here')",
        "os.kill(-1, signal.SIGKILL)",
        "print('anew')",
    )
    assert found[0].output == "True True\n"
    assert (
        found[2].output == "still here\n"
    )  # the first process of a namespace cannot be killed from the inside
    assert found[4].output == "anew\n"
    psutil.Process()  # and so are we


def test_sabotage_of_the_interpreter_ends_only_itself() -> None:
    found = snippets(
        "import os; os._exit(3)",
        "1",
        "import sys; sys.stdout = None",
        "2",
        "os = 1; exec('x' * 10**6)",
        "del print",
    )
    assert [o.reason for o in found] == ["died", "exit", "exit", "exit", "exit", "exit"]
    assert found[1].output == "1\n"
    close = snippets("import os; os.close(1)", "3")
    assert close[0].reason in ("died", "timeout")
    assert close[1].output == "3\n"


def test_daemons_do_not_survive() -> None:
    """Neither beyond a command nor beyond a session."""
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        "
        "time.sleep(3600)\n    os._exit(0)\nprint('started')"
    )
    assert python(daemon).output == "started\n"
    began = time.monotonic()
    assert bash("setsid nohup sleep 3600 >/dev/null 2>&1 & echo started").output == "started\n"
    assert time.monotonic() - began < 3  # the fixture sees that nothing is left


def test_bytes_that_are_no_text() -> None:
    done = bash(r"printf '\xff\xfe\x00abc'")
    assert done.output.endswith("abc")
