"""Errors that the user sees as one line, and their exit codes.

0 done · 2 the user's mistake (nothing was lost) · 3 a worker failed (the last checkpoint is intact) ·
130 interrupted (a checkpoint was written).
"""

EXIT_DONE = 0
EXIT_USER = 2
EXIT_WORKER = 3
EXIT_INTERRUPTED = 130


LONGEST = 1400  # characters


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
