"""The paper: how fresh a sample is (`drift.py`, `score.py`) and what is done about it (`policies.py`,
`score.py`, `refresh.py`). `ahead.py`, `pace.py` and `trust.py` are ours.

Pure tensor code. It knows nothing about engines or processes. Symbols are those of the f-OPD paper (arXiv
2605.17862): `t` the student's version now, `r` the version that sampled, `tau = t - r` the lag, `D_roll` and
`D_sup` the drifts.
"""
