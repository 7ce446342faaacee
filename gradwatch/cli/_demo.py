"""`gradwatch demo`: a small GPT, one corrupt batch, and what gradwatch makes of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import ModuleType

from ..errors import GradwatchError, MissingExtraError
from ._terminal import say, show, show_json

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a small GPT with a fault planted, and see it found and mended (a minute or two)"
LOSSES = {
    "healthy": "loss of the last 20 steps, no accident",
    "spiked": "with the corrupt batch, not watched",
    "autoclip": "with the corrupt batch, rules=autoclip",
}
FAST = ("--steps", "80", "--dim", "32", "--layers", "2", "--context", "32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fast", action="store_true", help="a smaller network and fewer steps: seconds")
    parser.add_argument("--out", metavar="DIR", help="where to (default: the next free of runs/demo, runs/demo-2, ...)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; all else on stderr")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out).expanduser() if options.out else _free(Path("runs/demo"))
    say("gradwatch demo: three small networks, one after the other, on the CPU")
    begun = perf_counter()
    example = _example("char_gpt")
    with _hushed(), contextlib.redirect_stdout(_Progress()):
        losses = example.main(["--out", str(out), *(FAST if options.fast else ())])
    seconds = perf_counter() - begun
    report, command = out / "report.html", f"tensorboard --logdir {shlex.quote(str(out))}"
    from ..report import ReportData, summarise
    from ..runs import read_run

    data = ReportData.from_run(read_run(out / "autoclip" / "gradwatch"))
    if options.json:
        summary = summarise(data)
        show_json(
            {
                "losses": losses,
                "state": summary.state,
                "verdict": summary.verdict.state,
                "headline": summary.headline,
                "incidents": [i.to_json() for i in data.incidents],
                "seconds": seconds,
                "report": str(report),
                "tensorboard": command,
            }
        )
        return 0
    from ._summary import show_summary

    show()
    show_summary(data)
    show()
    for name, words in LOSSES.items():
        show(f"{words:46} {losses[name]:.3f}")
    show()
    show(f"{seconds:.0f} s in all. Two things to look at:", "dim")
    show(f"report:       {report}")
    show(f"TensorBoard:  {command}    (then the GradWatch tab)")
    return 0


def _free(wanted: Path) -> Path:
    """Return the first of `wanted`, `wanted-2`, ... that is not there: two runs in one folder mix their curves."""
    number, path = 1, wanted
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    return path


def _example(name: str) -> ModuleType:
    """Return an example as a module: from the installed package, else from the repository beside it.

    Raises:
        GradwatchError: it is in neither place.
        MissingExtraError: Lightning is not installed.
    """
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise MissingExtraError("gradwatch demo", "pytorch_lightning", "lightning")
    package = Path(__file__).resolve().parents[1]
    places = [package / "_examples" / f"{name}.py", package.parent / "examples" / f"{name}.py"]
    file = next((p for p in places if p.is_file()), None)
    if file is None:
        raise GradwatchError(f"the example {name}.py is not there. Looked for {' and '.join(map(str, places))}.")
    spec = importlib.util.spec_from_file_location(f"gradwatch_example_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep the trainer's tips and list of devices out of the demo."""
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning.*")
            yield
    finally:
        logger.setLevel(before)


class _Progress(io.TextIOBase):
    """Passes on what the example says while it trains; what it says at its end is shown better here."""

    def __init__(self) -> None:
        self._line, self._is_over = "", False

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._is_over |= line.startswith("gradwatch: ")
            if line and not self._is_over:
                say(line)
        return len(text)
