"""How numbers that a model is to predict are spread over a batch. Reads nothing back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torchside import wide_dtype
from ._numbers import Scalars
from ._prediction import Prediction

__all__ = ["repeats", "tail"]

MAX_TARGETS = 2**16
LEAST_TARGETS = 8


def repeats(target: Tensor, pred: Prediction | None) -> Scalars:
    """Return the commonest of the batch's targets, and the share of them that are just this number."""
    if not _are_numbers(target, pred):
        return {}
    ordered = target.detach().reshape(-1).to(wide_dtype(target.device)).sort().values
    places = torch.arange(len(ordered), device=ordered.device)
    is_new = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
    # Each number's first place, carried on to its last one.
    length = places - torch.where(is_new, places, torch.zeros_like(places)).cummax(0).values + 1
    most, last = length.max(0)
    return {"target_mode": ordered.gather(0, last.reshape(1)).squeeze(0), "target_mode_share": most / len(ordered)}


def tail(target: Tensor, pred: Prediction | None) -> Scalars:
    """Return how far the farthest target lies from their median, in median distances; nan where half are alike."""
    if not _are_numbers(target, pred):
        return {}
    flat = target.detach().reshape(-1).to(wide_dtype(target.device))
    distance = (flat - flat.median()).abs()
    middle = distance.median()
    return {"target_tail": torch.where(middle > 0, distance.max() / middle, torch.nan)}


def _are_numbers(target: Tensor, pred: Prediction | None) -> bool:
    """Return whether targets stand against one output unit each, as numbers do, and are few enough to be sorted."""
    if pred is None or pred.numel() != target.numel() or not target.is_floating_point():
        return False
    return LEAST_TARGETS <= target.numel() <= MAX_TARGETS and target.numel() == target.shape[0]
