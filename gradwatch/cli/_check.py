"""`gradwatch check MODULE:NAME`: what can be known of a model, a batch, a loss and an optimizer before training."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ._outcome import add_fail_on, severe
from ._target import load, pieces_of
from ._terminal import show, show_json

if TYPE_CHECKING:
    from .._preflight import PreflightReport

__all__ = ["HELP", "add_arguments", "run"]

HELP = "pre-flight of a LightningModule, or of what a function returns, before step 0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "target",
        metavar="MODULE:NAME",
        help="package.module:NAME or file.py:NAME; a LightningModule class, or a function that returns one, or "
        "(model, batch, loss_fn, optimizer), of which the last two may be left out",
    )
    add(
        "--batch",
        metavar="MODULE:NAME",
        help="a batch, a data set or loader, a LightningDataModule, or a function that returns one (default: the "
        "module's own train_dataloader)",
    )
    add("--init", action="append", default=[], metavar="NAME=VALUE", help="an argument for the class or function")
    add("--skip", action="append", default=[], metavar="CHECK", help="a check to leave out")
    add("--steps", type=int, default=30, metavar="N", help="of overfitting the one batch; 0: none (default: 30)")
    add("--json", action="store_true", help="one JSON document instead")
    add_fail_on(parser, "warning")


def run(options: argparse.Namespace) -> int:
    import torch

    from .._preflight import check_lightning, preflight

    torch.manual_seed(0)
    made = load(options.target, options.init)
    batch = None if options.batch is None else load(options.batch, [])
    model, given, rest, is_lightning = pieces_of(made, batch, options.target)
    settings: dict[str, Any] = {"skip": tuple(options.skip), "overfit_steps": options.steps}
    try:
        if is_lightning:
            report = check_lightning(model, given, **settings)
        else:
            report = preflight(model, given, *rest, **settings)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{options.target}: the first pass failed with {type(error).__name__}: {error}") from error
    if options.json:
        show_json(_document(report, options.target))
    else:
        _show(report)
    return severe((f.severity for f in report.findings), options.fail_on)


def _show(report: PreflightReport) -> None:
    head, *_ = str(report).split("\n", 1)
    show(head, "fine" if report.ok else "head")
    for finding in report.findings:
        show()
        show(str(finding), finding.severity)
        for label, text in (("Why", finding.cause), ("What to try", finding.advice)):
            if text:
                show(f"{label}: {text}", indent=3)
    if report.skipped:
        show()
    for name, why in report.skipped.items():
        show(f"not checked: {name} ({why})", "dim")


def _document(report: PreflightReport, target: str) -> dict[str, Any]:
    fields = ("check", "severity", "path", "message", "cause", "advice", "value", "limit")
    return {
        "target": target,
        "ok": report.ok,
        "findings": [{name: getattr(finding, name) for name in fields} for finding in report.findings],
        "checks": report.checks,
        "skipped": report.skipped,
        "measures": report.measures,
        "seconds": report.seconds,
    }
