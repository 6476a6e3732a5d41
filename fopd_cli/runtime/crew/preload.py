"""What a worker imports; see `warm.py`. Importing this does it."""

import ctypes
import signal
from importlib import import_module

from fopd_cli.runtime.crew.warm import PR_SET_PDEATHSIG

# First of all: a command that is refused at once shall not be waited for.
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

for _name in ("fopd_cli.engines.preload", "fopd_cli.runtime.crew.roles"):
    import_module(_name)
