"""RUN on the command line -> what was recorded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, RunFormatError, suggest
from ._terminal import say

if TYPE_CHECKING:
    from ..report import ReportData
    from ..runs import Log, Run

__all__ = ["RUN_HELP", "add_run", "existing", "gathered", "open_run", "pairs"]

RUN_HELP = "a run folder, a folder above some (then the newest of them), or another program's TensorBoard or CSV log"


def add_run(parser: argparse.ArgumentParser, name: str = "run") -> None:
    parser.add_argument(name, metavar="RUN", help=RUN_HELP)


def existing(text: str, what: str) -> Path:
    """Return the path of something that exists.

    Raises:
        ConfigError: it does not; with the nearest names beside it.
    """
    path = Path(text).expanduser()
    if path.exists():
        return path
    above = path.parent
    if not above.is_dir():
        known = [str(p) for p in above.parent.iterdir()] if above.parent.is_dir() else []
        raise ConfigError(
            f"there is no {what} {text!r}, nor a folder {str(above)!r}. {suggest(str(above), known)}".rstrip()
        )
    # Compared by name, and told with the folder, so that it can be copied.
    names = {p.name: str(p) for p in above.iterdir() if not p.name.startswith(".")}
    hint = suggest(path.name, names)
    for name, whole in sorted(names.items(), key=lambda item: -len(item[0])):
        hint = hint.replace(f"{name!r}", f"{whole!r}")
    raise ConfigError(f"there is no {what} {text!r}. {hint}".rstrip())


def open_run(
    text: str, *, scalars: Mapping[str, str] | None = None, columns: Mapping[str, str] | None = None
) -> Run | Log:
    """Return the run, the newest run below, or the log.

    Args:
        text: as given.
        scalars, columns: what the tags of another program's log mean; see `gradwatch.runs.read_log`.

    Raises:
        ConfigError: there is no such path.
        RunFormatError: it is neither a run nor a log.
    """
    from ..runs import find_runs, may_hold_run, read_log, read_run

    path = existing(text, "run")
    if path.is_file() and path.name in ("meta.json", "incidents.jsonl", "summary.md"):
        path = path.parent
    if may_hold_run(path):
        return read_run(path)
    found = find_runs(path) if path.is_dir() else []
    if found:
        newest = max(found, key=_last_change)
        if len(found) > 1:
            say(f"{newest}: the newest of {len(found)} runs below {path}")
        return read_run(newest)
    try:
        return read_log(path, scalars=scalars, columns=columns)
    except RunFormatError as error:
        if path.is_dir() and "nor is it a CSV file" in str(error):
            raise RunFormatError(f"there is no run folder, and no other log, at or below {str(path)!r}.") from None
        raise


def gathered(run: Run | Log) -> ReportData:
    """Return all that a report shows of a run or a log."""
    from ..report import ReportData

    return ReportData.from_run(run)  # type: ignore[arg-type]  # a log has all that is asked of it


def _last_change(folder: Path) -> float:
    return max(file.stat().st_mtime for file in folder.iterdir())


def pairs(given: list[str], option: str) -> dict[str, str]:
    """Return NAME=VALUE arguments as a dict.

    Raises:
        ConfigError: one has no `=`.
    """
    found = {}
    for item in given:
        name, is_pair, value = item.partition("=")
        if not is_pair or not name:
            raise ConfigError(f"{option} takes NAME=VALUE. Got {item!r}.")
        found[name] = value
    return found
