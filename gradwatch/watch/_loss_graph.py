"""What a loss was made of, read from its graph: where nobody hands over outputs and targets, they are found there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..torchside import loss_form, loss_pair
from ._numbers import Scalars
from ._prediction import Prediction, predicted

__all__ = ["SeenLoss", "form_scalars", "seen_loss"]


@dataclass(frozen=True)
class SeenLoss:
    """What is kept of a loss until its step is measured.

    Attributes:
        scalars: how it was made.
        outputs: what it compares; None where its graph does not tell.
        targets: with what; a copy.
    """

    scalars: Scalars
    outputs: Prediction | None = None
    targets: Tensor | None = None


def form_scalars(loss: Any) -> Scalars:
    """Return how a loss was made, before backward or after, in numbers; nothing where its graph does not tell."""
    form = loss_form(loss)
    if form is None:
        return {}
    return {
        "loss_of_softmax": float(form.of_softmax),
        "loss_of_sigmoid": float(form.of_sigmoid),
        "loss_of_chosen": float(form.of_chosen),
        "loss_of_shares": float(form.of_shares),
    }


def seen_loss(loss: Any, kept: int) -> SeenLoss:
    """Return what is kept of a loss before its backward: outputs and targets too where they are small.

    Args:
        loss: before backward.
        kept: elements that outputs or targets may have.
    """
    scalars, pair = form_scalars(loss), loss_pair(loss)
    if pair is None or max(t.numel() for t in pair) > kept:
        return SeenLoss(scalars)
    outputs, targets = pair
    return SeenLoss(scalars, predicted(outputs, kept), targets.clone())
