"""Checks of sequences and rows: what an output may depend on, and whether samples differ at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..torchside import map_tensors, tensors_of
from ._report import PreflightFinding
from ._snapshot import same_randomness
from ._task import first_tensor
from ._trial import NotChecked, Trial

__all__ = ["repeated_rows", "sees_future"]

Findings = Iterable[PreflightFinding]

LEAST_PLACES = 4
NEXT_ONES = 0.95
MOST_COPIES = 0.5
LEAST_ROWS = 8
CHANGED = 1e-4
"""Of the outputs' size: what rounding in another order makes is less."""


def sees_future(trial: Trial) -> Findings:
    """Where the next place of a sequence is to be predicted, no output changes with the inputs behind its own place.

    The inputs of the later half are put into another order, in eval mode, and the outputs of the earlier half compared.
    """
    given = _sequence(trial)
    if given is None:
        return
    middle = given.shape[1] // 2
    changed = given.clone()
    changed[:, middle:] = given[:, middle:].roll(1, 0).flip(1)
    if torch.equal(changed, given):
        return
    trial.model.eval()
    with torch.no_grad():
        before, after = (_outputs(trial, given, x) for x in (given, changed))
    if before is None or after is None or before.shape != after.shape or before.shape[:2] != given.shape[:2]:
        raise NotChecked("the next place is to be predicted, but no output with as many places was seen")
    early = before[:, :middle].double()
    moved = (after[:, :middle].double() - early).abs().amax().item()
    size = early.abs().amax().item()
    if moved > CHANGED * max(size, 1e-12):
        yield PreflightFinding(
            check="sees_future",
            severity="critical",
            message=f"in eval mode, outputs of the first {middle} places change by {moved / max(size, 1e-12):.2g} of "
            "their size with the inputs behind them, which are what is to be predicted",
            cause="a causal mask that is missing or the wrong way round, batch_first left out, a recurrent layer that "
            "reads both ways, a convolution or normalisation over time",
            advice="is_causal=True or an upper triangular mask in the attention; pad convolutions on the left alone",
            value=moved,
            limit=CHANGED * size,
        )


def _sequence(trial: Trial) -> Tensor | None:
    """Return the inputs where their next place is what is to be predicted; None where it is not."""
    wanted = trial.task.targets
    if not isinstance(wanted, Tensor):
        return None
    for _, x in tensors_of(trial.task.inputs, objects=True):
        if x.dim() < 2 or x.shape != wanted.shape or x.shape[1] < LEAST_PLACES or x.dtype != wanted.dtype:
            continue
        # The tokens themselves: the model's own loss moves them.
        if _agree(wanted[:, :-1], x[:, 1:]) or (trial.task.loss_fn is None and _agree(wanted, x)):
            return x
    return None


def _agree(wanted: Tensor, given: Tensor) -> bool:
    """Return whether they are the same, but for labels such as -100 that mean "ignore"."""
    counted = torch.ones_like(wanted, dtype=torch.bool) if wanted.is_floating_point() else wanted >= 0
    return bool(counted.any()) and (wanted == given)[counted].double().mean().item() >= NEXT_ONES


def _outputs(trial: Trial, given: Tensor, x: Tensor) -> Tensor | None:
    with same_randomness():
        return first_tensor(trial.task.outputs_of(lambda tree: map_tensors(tree, _in_place_of(given, x))))


def _in_place_of(given: Tensor, x: Tensor) -> Any:
    return lambda tensor, _: x if tensor is given else None


def repeated_rows(trial: Trial) -> Findings:
    """Samples of the batch differ: fewer than half are copies of another. Numbers alone, not flags or counts."""
    x = next((t for _, t in tensors_of(trial.task.inputs, objects=True) if t.is_floating_point()), None)
    if x is None or x.dim() < 2 or x.shape[0] < LEAST_ROWS or bool((x == x.round()).all()):
        return
    rows = x.detach().flatten(1)
    copies = 1 - len(torch.unique(rows, dim=0)) / len(rows)
    trial.measures["repeated_rows"] = copies
    if copies > MOST_COPIES:
        yield PreflightFinding(
            check="repeated_rows",
            message=f"{copies:.0%} of the batch's {len(rows)} samples are copies of another one",
            cause="references to one array that is written over, a data set that returns one index, an expand()",
            advice="copy what is kept (state.copy(), tensor.clone()); look at two samples of the loader",
            value=copies,
            limit=MOST_COPIES,
        )
