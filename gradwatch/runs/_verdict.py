"""The verdict on anything that is, or holds, a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RunFormatError
from ..records import Verdict, judge_run
from ._folder import may_hold_run
from ._log import read_log
from ._run import read_run

__all__ = ["verdict"]


def verdict(run: Any) -> Verdict:
    """Return whether a run is healthy, not healthy, or not enough of it was seen to say so.

    The same answer as the terminal, the report, the tab and the exit codes give. A run is healthy where its rules
    judged enough of it (see `Verdict.judged`), it came to its end, all of it is on record, and no incident is left that
    nothing was done about. `Verdict.reasons` says what is missing.

    Args:
        run: a `Watch` or callback, during training or after it; a run or log as it was read, or a `Replay`; or the path
            of a run folder or another program's log.

    Raises:
        ConfigError: it is nothing of the kind.
    """
    if isinstance(run, (str, os.PathLike)):
        return _of_path(Path(run))
    ask = getattr(run, "verdict", None)
    told = ask() if callable(ask) and not isinstance(run, type) else None
    if not isinstance(told, Verdict):
        raise ConfigError(
            f"`verdict` takes a Watch, a callback, a run that was read, or the path of one. Got {type(run).__name__}."
        )
    return told


def _of_path(path: Path) -> Verdict:
    if not path.exists():
        raise ConfigError(f"there is no run {str(path)!r}.")
    if path.is_dir() and not any(path.iterdir()):
        return judge_run(coverage=None, ended="unknown", how="the folder is empty")
    try:
        return read_run(path).verdict()
    except RunFormatError:
        if may_hold_run(path):
            raise
        return read_log(path).verdict()
