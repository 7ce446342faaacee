"""What narrow number formats lose, of gradients, activations and updates: measured, before one switches to them."""

from __future__ import annotations

from ._formats import FORMATS, CastLoss, Format, cast, cast_loss
from ._report import FormatLoss, PrecisionReport, loss_table, precision_report
from ._statistics import ActivationFormats, GradientFormats

__all__ = [
    "FORMATS",
    "ActivationFormats",
    "CastLoss",
    "Format",
    "FormatLoss",
    "GradientFormats",
    "PrecisionReport",
    "cast",
    "cast_loss",
    "loss_table",
    "precision_report",
]
