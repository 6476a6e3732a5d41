"""What runs have become, for people: `reading.py` takes a run directory as it stands, `page.py` makes one
HTML file of runs (curves by uPlot, which lies in `vendor/`), `watch.py` shows it while they go on,
`tables.py` is for the terminal.

Nothing here imports torch, and nothing here writes into a run directory but the page itself.
"""
