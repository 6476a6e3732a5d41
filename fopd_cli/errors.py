"""The errors that a user sees as one line, and the exit codes they mean.

0 done · 2 the user's mistake (nothing was lost) · 3 a worker failed (the last checkpoint stands) ·
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
        # What people wrote stands in it: it may be long, of several lines, or no text that can be encoded.
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

    Not KeyboardInterrupt itself: Python kills a process with SIGINT in which that one passed through exec of
    a string, as dataclasses run it while modules are imported, even where it was handled.
    """
