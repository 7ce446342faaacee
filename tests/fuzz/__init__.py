"""Files damaged at random: whatever bytes they hold, a reader ends in words, and nothing is missing in silence.

A kind of file is one class in a module of `tests/fuzz/kinds/`; every module there is found by itself. `make fuzz` runs
them all (`python -m tests.fuzz KIND --number N --seed S`), and so does a slow test.
"""
