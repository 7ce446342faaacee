"""`gradwatch watch RUN`: a running job, live in the terminal. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, GradwatchError
from ._find import add_run, open_run
from ._outcome import FINE, add_fail_on, outcome
from ._terminal import STYLES, columns, printable, rich_console, say

if TYPE_CHECKING:
    from ..runs import Log, Run
    from ._live import Frame

__all__ = ["HELP", "add_arguments", "run"]

HELP = "a running job, live: norms, worst layers, incidents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--wait",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="how long to wait for a run that is not there yet (default: until it comes; with --once not at all)",
    )
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    parser.add_argument("--layers", type=int, default=12, metavar="N", help="layers shown (default: 12)")
    parser.add_argument("--json", action="store_true", help="one line of JSON per look that found something new")
    add_fail_on(parser, "never")


def run(options: argparse.Namespace) -> int:
    """Look again and again until the run is complete, or Ctrl-C."""
    from ..runs import Run
    from ._live import is_over

    if not options.every > 0:
        raise ConfigError(f"--every takes seconds above 0. Got {options.every}.")
    try:
        opened = _awaited(options)
    except KeyboardInterrupt:
        return FINE
    if not isinstance(opened, Run):
        raise ConfigError(f"{opened.path} is another program's log; `watch` takes a run folder. Try gradwatch summary.")
    view = _view(options)
    try:
        with view:
            while True:
                frame = _look(opened, options.layers)
                view.update(frame)
                if options.once or frame.is_over:
                    break
                sleep(options.every)
                # In place, the age of the last record is redrawn too; a pipe gets what is new.
                while not opened.refresh() and not is_over(opened) and not view.in_place:
                    sleep(options.every)
    except KeyboardInterrupt:
        return FINE
    return outcome(opened.verdict(), opened.incidents, options.fail_on)


def _awaited(options: argparse.Namespace) -> Run | Log:
    """Return the run, as soon as it is there.

    Raises:
        ConfigError: it did not come in time.
    """
    until = monotonic() + (0.0 if options.once else options.wait)
    told = False
    while True:
        try:
            return open_run(options.run)
        except GradwatchError as error:
            path = Path(options.run).expanduser()
            # A folder that is empty, or holds no run yet, is one to come; a file that is none never will be.
            if monotonic() >= until or path.is_file():
                raise
            if not told:
                say(f"waiting for a run at {options.run!r}: {error} Ctrl-C ends the wait.")
                told = True
        sleep(min(options.every, 1.0))


def _look(run: Run, max_layers: int) -> Frame:
    from ._live import look

    return look(run, max_layers=max(max_layers, 1))


def _view(options: argparse.Namespace) -> Any:
    if options.json:
        return _JsonLines()
    return _Screen() if rich_console() is not None and not options.once else _Pages()


class _Pages:
    """One page after the other, for pipes and terminals without rich."""

    in_place = False

    def __enter__(self) -> _Pages:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, frame: Frame) -> None:
        from ._terminal import show_lines

        show_lines(frame.lines(columns()))


class _JsonLines(_Pages):
    def update(self, frame: Frame) -> None:
        import json

        from ._terminal import plain

        print(json.dumps(plain(frame.document()), allow_nan=False), flush=True)


class _Screen(_Pages):
    """The page in place, redrawn."""

    in_place = True

    def __enter__(self) -> _Screen:
        from rich.live import Live

        self._live = Live(console=rich_console(), auto_refresh=False, transient=False)
        self._live.__enter__()
        say("Ctrl-C ends the view, not the run.")
        return self

    def __exit__(self, *problem: object) -> None:
        self._live.__exit__(*problem)
        sys.stdout.flush()

    def update(self, frame: Frame) -> None:
        from rich.text import Text

        text = Text(no_wrap=True, overflow="ellipsis")
        for line, style in frame.lines(columns()):
            text.append(printable(line, keep="") + "\n", style=STYLES[style])
        self._live.update(text, refresh=True)
