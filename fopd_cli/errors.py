"""Errors that the user sees as one line, and their exit codes.

0 done · 2 the user's mistake (nothing was lost) · 3 a worker failed (the last checkpoint is intact) ·
130 interrupted (a checkpoint was written).
"""

from __future__ import annotations

import errno

EXIT_DONE = 0
EXIT_USER = 2
EXIT_WORKER = 3
EXIT_INTERRUPTED = 130


LONGEST = 1400  # characters
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line that a terminal can show. Exit code 2."""

    def __init__(self, message: str) -> None:
        # It may quote user input, which can be long, have several lines, or be impossible to encode.
        line = " ".join(message.split()).encode("utf-8", "backslashreplace").decode()
        if len(line) > LONGEST:
            line = f"{line[: LONGEST * 2 // 3]} [...] {line[-LONGEST // 3 :]}"
        super().__init__(line)


class WorkerError(Exception):
    """A worker process died, hung or raised. The message names it and its log. Exit code 3."""


class Interrupted(Exception):
    """The user pressed Ctrl-C. Exit code 130."""


class Signalled(KeyboardInterrupt):
    """A signal asks the command to end. Exit code 130.

    Not KeyboardInterrupt itself: once that has passed through exec of a string, as dataclasses call it while
    modules are imported, Python kills the process with SIGINT, even if it was handled.
    """


def disk_error(error: BaseException) -> str | None:
    """The text of a full or refusing disk's error, anywhere in an exception's history; or None."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        e = pending.pop()
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, OSError) and e.errno in NO_SPACE:
            return str(e)
        pending += [e.__cause__, e.__context__, *(a for a in e.args if isinstance(a, BaseException))]
        failures = getattr(e, "failures", None)  # torch's CheckpointException: rank -> (exception, traceback)
        if isinstance(failures, dict):
            pending += [f[0] for f in failures.values()]
    text = str(error)
    # torch's file writer is C++ and reports a short write only in words.
    return text.splitlines()[0] if "No space left" in text or "PytorchStreamWriter failed" in text else None
