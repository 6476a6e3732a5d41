"""One command's processes: what each does and when (`schedule.py`), on which device (`placement.py`), and
what keeps them running.
"""
