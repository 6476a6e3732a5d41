"""`fopd plan`: what a run will take, before a device is rented.

recipe, devices ──cost.py──> seconds of each action ──simulate.py──> seconds a step, lag, idle shares
a finished run ──calibrate.py──┘                       split.py tries other splits and lags; page.py shows
"""
