"""The parser, the errors and the way to each command."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from .._version import __version__
from ..errors import ConfigError, GradwatchError, GradwatchWarning, UnknownNameError, suggest
from ._outcome import FINE, USAGE
from ._terminal import say

__all__ = ["COMMANDS", "main"]

COMMANDS = ("demo", "summary", "report", "serve", "watch", "replay", "test", "check", "compare", "doctor")

EXIT_CODES = """exit codes:
  0    fine: nothing at or above --fail-on
  1    incidents or findings at or above --fail-on, a rule's test that failed, an installation that does not work
  2    a command, option, path or file that can't be: one line on stderr says which
  3    nothing at or above --fail-on, but not enough was seen to say that all is well
  130  interrupted (`watch` ends with 0)

Data goes to stdout, talk to stderr. `gradwatch COMMAND --help` says more."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, with the nearest names."""

    def error(self, message: str) -> NoReturn:
        words = self.prog.partition(" ")[2]
        raise ConfigError(f"{words + ': ' if words else ''}{message}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = "command" if action.dest == "command" else f"value of {'/'.join(action.option_strings)}"
            raise UnknownNameError(kind, value, [str(c) for c in action.choices])

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, extra = self.parse_known_args(args, namespace)
        if extra:
            known = {o for action in options.parser._actions for o in action.option_strings}
            what = "option" if extra[0].startswith("-") else "argument"
            hint = suggest(extra[0].partition("=")[0], known, otherwise=f"See gradwatch {options.command} --help.")
            raise ConfigError(f"{options.command} has no {what} {extra[0]!r}. {hint}")
        return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = "--traceback" in given
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without a character gets a question mark
    try:
        return _run(given)
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else FINE
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # The reader went away (`gradwatch summary RUN | head`); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FINE
    except (GradwatchError, OSError) as error:
        if wants_traceback:
            raise
        say("gradwatch: " + " ".join(str(error).split()))
        return USAGE


def _run(given: list[str]) -> int:
    if not given:
        raise ConfigError(f"give a command: {', '.join(COMMANDS)}. See gradwatch --help.")
    options = _parser().parse_args([a for a in given if a != "--traceback"])
    with _spoken_warnings():
        return options.go(options)


def _parser() -> _Parser:
    parser = _Parser(
        prog="gradwatch",
        description="See and steer gradients while a PyTorch network trains.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gradwatch {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name in COMMANDS:
        module = import_module(f"._{name}", __package__)
        description = (module.__doc__ or "").split(": ", 1)[-1]
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=description[:1].upper() + description[1:],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        go: Callable[[argparse.Namespace], int] = module.run
        sub.set_defaults(go=go, parser=sub)
    return parser


@contextmanager
def _spoken_warnings() -> Any:
    """gradwatch's own warnings are one line of talk here."""
    before = warnings.showwarning

    def speak(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, GradwatchWarning):
            say(f"gradwatch: {message}")
        else:
            before(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", GradwatchWarning)
        warnings.showwarning = speak
        yield
