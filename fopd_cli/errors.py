"""The errors that a user sees as one line, and the exit codes they mean.

0 done · 2 the user's mistake (nothing was lost) · 3 a worker failed (the last checkpoint stands) ·
130 interrupted (a checkpoint was written).
"""

EXIT_DONE = 0
EXIT_USER = 2
EXIT_WORKER = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. Exit code 2."""


class WorkerError(Exception):
    """A worker process died, hung or raised. The message names it and its log. Exit code 3."""


class Interrupted(Exception):
    """The user pressed Ctrl-C. Exit code 130."""
