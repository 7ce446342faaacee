"""Breaks the package by small changes, one at a time, and sees whether the tests notice: `python -m tools.mutants`."""
