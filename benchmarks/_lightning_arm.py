"""One arm of `lightning_suite.py`: the callback that every Trainer gets, and a pytest plugin that notes what came out.

Copied beside an entry point of its own into a folder on the path; it changes nothing in Lightning.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

__all__ = ["GROUPS", "lightning", "pytorch_lightning"]

GROUPS = {
    "lightning": "lightning.pytorch.callbacks_factory",
    "pytorch_lightning": "pytorch_lightning.callbacks_factory",
}

_FOLDER, _ARM = "LIGHTNING_SUITE_FOLDER", "LIGHTNING_SUITE_ARM"
# The most intrusive there is: hooks on every module and everything measured at every step.
_EVERYTHING = {"activations_every": 1, "updates_every": 1, "histograms_every": 1, "log_every": 1, "local_norms": True}


def lightning() -> list[Any]:
    """Return the callback for `lightning.pytorch.Trainer`."""
    return [_callback("lightning.pytorch")]


def pytorch_lightning() -> list[Any]:
    """Return the callback for `pytorch_lightning.Trainer`."""
    return [_callback("pytorch_lightning")]


def _callback(package: str) -> Any:
    # A test may have emptied the environment.
    arm = os.environ.get(_ARM, _arm_at_start)
    callback = import_module(f"{package}.callbacks").Callback
    if arm == "empty":
        return callback()
    from gradwatch.callbacks._from_environment import trainer_callback

    # Its own faults are errors, and it writes where it would by itself: what it leaves behind is a fault too.
    settings = {**_EVERYTHING, "backward": "full"} if arm == "everything" else {}
    made = trainer_callback(callback, "default", on_error="raise", **settings)
    _made.append(made)
    return made


_made: list[Any] = []
_arm_at_start, _folder_at_start = os.environ.get(_ARM, "empty"), os.environ.get(_FOLDER, "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append one line for each phase of each test: a crash of the process loses nothing."""
    error = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash is not None else str(report.longrepr)
    _note(test=report.nodeid, phase=report.when, outcome=report.outcome, error=error)
    if report.when == "teardown":
        for callback in _made:
            if callback.history:
                _note(test=report.nodeid, phase="watched", outcome="watched", error="")
        _made.clear()


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note files that can't be read: their tests do not run."""
    if report.failed:
        _note(
            test=report.nodeid, phase="collect", outcome="failed", error=str(report.longrepr).strip().splitlines()[-1]
        )


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    """Note what gradwatch warns of: with its own faults, training goes on."""
    text = str(warning_message.message)
    if text.startswith("gradwatch"):
        _note(test=nodeid, phase="warning", outcome="warned", error=text)


def _note(**line: Any) -> None:
    with (Path(_folder_at_start) / "outcomes.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
