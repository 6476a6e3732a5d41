"""`fopd plan`: what a run will take, before you rent a device.

recipe, devices ──cost.py──> seconds of each action ──simulate.py──> step time, lag, idle shares
a finished run ──calibrate.py──┘                       split.py tries other splits and lags; page.py prints
"""
