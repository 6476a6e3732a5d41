"""Reports on runs: `reading.py` reads a run directory in any state, `page.py` makes one HTML file of runs
(curves by uPlot, from `vendor/`), `watch.py` serves it while they go on, `tables.py` is for the terminal.

Nothing here imports torch, and nothing here writes into a run directory but the page itself.
"""
