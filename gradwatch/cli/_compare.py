"""`gradwatch compare RUN RUN`: how two runs differ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ._find import add_run, open_run
from ._outcome import add_fail_on, outcome
from ._terminal import Grid, show, show_grid, show_json

if TYPE_CHECKING:
    from ..runs import Comparison

__all__ = ["HELP", "add_arguments", "run"]

HELP = "numbers, settings, layers and incidents of two runs side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "a")
    add_run(parser, "b")
    parser.add_argument("--layers", type=int, default=10, metavar="N", help="layers that differ most (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead")
    add_fail_on(parser, "never")


def run(options: argparse.Namespace) -> int:
    """Exit with 1 where the second run has an incident at or above `--fail-on` that the first has not."""
    from ..runs import compare

    a, b = open_run(options.a), open_run(options.b)
    if a.path.resolve() == b.path.resolve():
        raise ConfigError(f"{options.a!r} and {options.b!r} are the same run: {a.path}.")
    result = compare(a, b)
    names = str(a.path), str(b.path)
    if options.json:
        show_json({"a": names[0], "b": names[1], **_document(result)})
    else:
        _show(result, names, options.layers)
    return outcome(b.verdict(), result.only_b, options.fail_on)


def _document(result: Comparison) -> dict[str, object]:
    return {
        "numbers": {name: {"a": one, "b": other} for name, (one, other) in result.numbers.items()},
        "first_difference": result.first_difference,
        "settings": {name: {"a": one, "b": other} for name, (one, other) in result.settings.items()},
        "layers": [{"path": d.path, "a": d.a, "b": d.b, "ratio": d.ratio} for d in result.layers],
        "only_a": [i.to_json() for i in result.only_a],
        "only_b": [i.to_json() for i in result.only_b],
        "only_paths_a": result.only_paths_a,
        "only_paths_b": result.only_paths_b,
        "verdict_a": result.verdict_a,
        "verdict_b": result.verdict_b,
    }


def _show(result: Comparison, names: tuple[str, str], max_layers: int) -> None:
    show(f"a: {names[0]}\nb: {names[1]}")
    show(f"a: {result.verdict_a}\nb: {result.verdict_b}")
    show()
    grid = Grid(["", "a", "b"], right=(1, 2))
    for name, (one, other) in result.numbers.items():
        grid.add(name, f"{one:.6g}", f"{other:.6g}")
    show_grid(grid)
    show()
    step = result.first_difference
    show("loss and norm never differ" if step is None else f"loss or norm first differ at step {step}")
    for name, (one, other) in result.settings.items():
        show(f"{name}: {one!r} | {other!r}")
    for which, paths in (("a", result.only_paths_a), ("b", result.only_paths_b)):
        if paths:
            show(f"only in {which}: {len(paths)} paths ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})")
    differing = [d for d in result.layers if d.ratio != 1][:max_layers]
    if differing:
        show()
        layers = Grid(["median gradient norm", "a", "b", "b/a"], right=(1, 2, 3))
        for d in differing:
            layers.add(d.path, f"{d.a:.3g}", f"{d.b:.3g}", f"{d.ratio:.3g}")
        show_grid(layers)
    for which, incidents in (("a", result.only_a), ("b", result.only_b)):
        for incident in incidents:
            show(f"only in {which}: {incident}", incident.severity)
