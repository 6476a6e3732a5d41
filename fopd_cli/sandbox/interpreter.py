"""A Python interpreter that keeps its state between snippets, in a sandbox of its own."""

from __future__ import annotations

import secrets
import time

from fopd_cli.sandbox.limits import Limits, Outcome
from fopd_cli.sandbox.process import Jail

# Reads "marker size\n" and that many bytes of source; after each snippet prints the marker and its status. A
# snippet that tampers with this loop harms only its own episode.
DRIVER = """
import ast, os, sys, traceback
commands = os.fdopen(os.dup(0), "rb")
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
scope = {"__name__": "__main__"}

def run(source):
    tree = ast.parse(source, "<code>")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), scope)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), "<code>", "eval"), scope)
        if value is not None:
            print(repr(value))

while header := commands.readline():
    marker, size = header.split()
    source, status = commands.read(int(size)).decode(), b"0"
    try:
        run(source)
    except BaseException as error:
        status = b"1"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<code>"]
        lines = traceback.format_list(frames) + traceback.format_exception_only(error)
        print("".join(lines), end="")
    try:
        sys.stdout.flush()
    except BaseException:
        pass
    os.write(1, marker + b" " + status + b"\\n")
"""


class PythonSession:
    """Runs snippets one after another in one scope. A last expression's value is shown, as at a prompt."""

    def __init__(self, limits: Limits, sandboxed: bool = True) -> None:
        self.limits, self.sandboxed = limits, sandboxed
        self._jail: Jail | None = None

    async def execute(self, source: str) -> Outcome:
        """After any reason but `exit` the interpreter is gone; the next snippet gets a new one."""
        began = time.monotonic()
        if self._jail is None:
            self._jail = await Jail.start(
                ["python3", "-u", "-c", DRIVER], self.limits, sandboxed=self.sandboxed
            )
        marker, data = secrets.token_hex(16).encode(), source.encode(errors="replace")
        await self._jail.send(marker + b" " + str(len(data)).encode() + b"\n" + data)
        output, line, reason = await self._jail.read(marker)
        if reason != "exit":
            self._jail = None
        code = int(line) if reason == "exit" and line.strip() in (b"0", b"1") else None
        return Outcome(output.decode(errors="replace"), reason, code, time.monotonic() - began)

    async def close(self) -> None:
        """End the interpreter and everything it started."""
        if self._jail is not None:
            jail, self._jail = self._jail, None
            await jail.kill()
