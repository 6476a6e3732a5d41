"""One command's processes: who does what when (`schedule.py`), on which device (`placement.py`), and who
keeps it running.
"""
