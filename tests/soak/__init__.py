"""Long runs against servers and engines of this machine, one module a figure of the reliability rules.

`make soak`, or `python -m soak aborts deaths --scale 0.1`. Each prints its figure and what was asked for; a
short version of each runs with the suite (`test_soak.py`).
"""
