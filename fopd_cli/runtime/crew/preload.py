"""What a worker imports; see `warm.py`. Importing this module imports it all."""

import ctypes
import signal
from importlib import import_module

from fopd_cli.runtime.crew.warm import PR_SET_PDEATHSIG

# First of all: if the command is refused at once, this process ends with it.
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

for _name in ("fopd_cli.engines.preload", "fopd_cli.runtime.crew.roles"):
    import_module(_name)
