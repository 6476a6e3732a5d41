"""Reports on runs: `reading.py` reads a run directory in any state, `page.py` turns runs into one HTML file
(curves by uPlot, from `vendor/`), `watch.py` serves it while they run, `tables.py` is for the terminal.

Nothing here imports torch, and nothing here writes into a run directory except the page itself.
"""
