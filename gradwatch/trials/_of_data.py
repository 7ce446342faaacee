"""Changes of the batches: which there are, and how inputs and targets belong to each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..torchside import tensors_of
from ._batches import inputs_of, targets_of, with_inputs, with_targets
from ._change import Change, NotApplicable
from ._of_optimizers import STANDS_OUT
from ._trial import Trial

__all__ = ["FiniteInputs", "NormalisedInputs", "RolledRows", "ScaledTargets", "ShiftedTargets", "WithoutBatch"]

UNUSUAL = 20.0
"""Inputs and targets whose size or spread is above this, or below one over it, are not scaled."""


def _targets(trial: Trial) -> list[Tensor]:
    found = [targets_of(batch) for batch in trial.batches]
    if not all(isinstance(each, Tensor) and each.dim() for each in found):
        raise NotApplicable("the batches hold no targets of their own")
    return found


@dataclass(frozen=True, repr=False)
class WithoutBatch(Change):
    """One batch is left out; None: the one whose loss stands out."""

    number: int | None = None
    kind: str = "part"
    cause: str = "one batch spoils the training"
    advice: str = "Look at the samples of that batch."

    @property
    def name(self) -> str:  # type: ignore[override]
        return "without the worst batch" if self.number is None else f"without batch {self.number}"

    def apply(self, trial: Trial) -> None:
        if len(trial.batches) < 2:
            raise NotApplicable("there is one batch")
        number = _worst(trial) if self.number is None else self.number
        if not 0 <= number < len(trial.batches):
            raise NotApplicable(f"there are {len(trial.batches)} batches")
        trial.batches = [batch for i, batch in enumerate(trial.batches) if i != number]


def _worst(trial: Trial) -> int:
    losses = trial.course.losses[: len(trial.batches) // trial.accumulate]
    known = [loss for loss in losses if isfinite(loss)]
    if trial.accumulate > 1 or len(losses) < 4 or not known:
        raise NotApplicable("no batch stands out")
    usual = median(known)
    worst = max(range(len(losses)), key=lambda i: losses[i] if isfinite(losses[i]) else float("inf"))
    if isfinite(losses[worst]) and not losses[worst] > STANDS_OUT * abs(usual):
        raise NotApplicable("no batch stands out")
    return worst


@dataclass(frozen=True, repr=False)
class FiniteInputs(Change):
    """NaN and infinity in inputs and targets are zeros."""

    name: str = "finite inputs"
    kind: str = "repair"
    cause: str = "inputs or targets hold values that are not finite"
    advice: str = "Fill or leave out what is missing in the data."

    def apply(self, trial: Trial) -> None:
        tensors = [t for batch in trial.batches for _, t in tensors_of(batch) if t.is_floating_point()]
        if all(bool(t.isfinite().all()) for t in tensors):
            raise NotApplicable("inputs and targets are finite")
        trial.on_batch.append(lambda batch: _finite(batch))


def _finite(batch: Any) -> Any:
    def change(tensor: Tensor, leaf: str = "") -> Tensor | None:
        return torch.nan_to_num(tensor, 0.0, 0.0, 0.0) if tensor.is_floating_point() else None

    made = with_inputs(batch, change)
    targets = targets_of(made)
    if isinstance(targets, Tensor) and targets.is_floating_point():
        made = with_targets(made, change)
    return made


@dataclass(frozen=True, repr=False)
class NormalisedInputs(Change):
    """Inputs of mean 0 and deviation 1, feature by feature (channel by channel, of images)."""

    name: str = "normalised inputs"
    cause: str = "inputs are not of a size that a network learns from"
    advice: str = "Normalise the inputs: mean 0 and deviation 1 over the training data."

    def apply(self, trial: Trial) -> None:
        moments = _moments(trial)
        if not moments:
            raise NotApplicable("no inputs are numbers")
        trial.on_batch.append(
            lambda batch: with_inputs(
                batch, lambda t, leaf: _standardised(t, *moments[leaf]) if _fits(t, moments.get(leaf)) else None
            )
        )

    def kind_in(self, trial: Trial) -> str:
        sizes = [_size(*pair) for pair in _moments(trial).values()]
        return "repair" if any(not 1 / UNUSUAL < size < UNUSUAL for size in sizes) else "setting"


def _moments(trial: Trial) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and deviation of each feature of each tensor of the inputs, by its way."""
    held: dict[str, list[Tensor]] = {}

    def note(tensor: Tensor, leaf: str) -> None:
        if tensor.is_floating_point() and tensor.dim() >= 2:
            axis = 1 if tensor.dim() != 3 else 2
            rows = tensor.detach().float().movedim(axis, -1).flatten(0, -2)
            held.setdefault(leaf, []).append(rows[: max(1, 200_000 // rows.shape[1])])

    for batch in trial.batches:
        with_inputs(batch, note)
    found = {}
    for leaf, rows in held.items():
        if len({r.shape[1] for r in rows}) == 1:
            every = torch.nan_to_num(torch.cat(rows), 0.0, 0.0, 0.0)
            found[leaf] = (every.mean(0), every.std(0, correction=0))
    return found


def _size(mean: Tensor, std: Tensor) -> float:
    return float((mean.square() + std.square()).mean().sqrt())


def _fits(tensor: Tensor, pair: tuple[Tensor, Tensor] | None) -> bool:
    axis = 1 if tensor.dim() != 3 else 2
    return pair is not None and tensor.dim() >= 2 and tensor.shape[axis] == len(pair[0])


def _standardised(tensor: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    axis = 1 if tensor.dim() != 3 else 2
    floor = 1e-6 * std.max().clamp(min=1e-30)
    made = (tensor.float().movedim(axis, -1) - mean) / torch.where(std > floor, std, torch.ones_like(std))
    return made.movedim(-1, axis).to(tensor.dtype).contiguous()


@dataclass(frozen=True, repr=False)
class ShiftedTargets(Change):
    """Targets of sequences, moved along the sequence: by 1, each place gets what stood one place before it."""

    by: int = 1
    kind: str = "part"
    cause: str = "targets stand at the wrong place of their sequences"
    advice: str = "Look at how inputs and targets are cut out of a sequence: the target of a place is the next token."
    is_of_loss: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"targets shifted by {self.by:+d}"

    def apply(self, trial: Trial) -> None:
        targets = _targets(trial)
        if not all(t.dim() == 2 and t.shape[1] > 4 and not t.is_floating_point() for t in targets):
            raise NotApplicable("targets are no sequences of tokens")
        if any(self._is_copy(batch) for batch in trial.batches[:2]):
            raise NotApplicable("the targets would be the inputs themselves")
        trial.on_batch.append(lambda batch: self._moved(batch))

    def _is_copy(self, batch: Any) -> bool:
        moved = self._moved(batch)
        targets = targets_of(moved)
        inputs = [t for _, t in tensors_of(inputs_of(moved)) if t.shape == targets.shape]
        return any(float((t == targets).float().mean()) > 0.9 for t in inputs)

    def _moved(self, batch: Any) -> Any:
        by = self.by
        kept = slice(by, None) if by > 0 else slice(None, by)

        def cut(tensor: Tensor, leaf: str = "") -> Tensor | None:
            return tensor[:, kept] if tensor.dim() >= 2 and tensor.shape[1] == length else None

        length = targets_of(batch).shape[1]
        # Places whose target would have to come from outside are cut off, of inputs too.
        moved = with_targets(batch, lambda y: y.roll(by, 1)[:, kept])
        return with_inputs(moved, cut)


@dataclass(frozen=True, repr=False)
class RolledRows(Change):
    """Targets moved by some rows within the batch."""

    by: int = 1
    kind: str = "part"
    cause: str = "inputs and targets of a batch do not belong together: they are off by a row"
    advice: str = "Look at what orders, shuffles or rolls one of the two alone."
    is_of_loss: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"rows re-aligned by {self.by:+d}"

    def apply(self, trial: Trial) -> None:
        if any(len(t) < 3 for t in _targets(trial)):
            raise NotApplicable("batches have too few rows")
        trial.on_batch.append(lambda batch: with_targets(batch, lambda y: y.roll(self.by, 0)))


@dataclass(frozen=True, repr=False)
class ScaledTargets(Change):
    """Targets of mean 0 and deviation 1."""

    name: str = "scaled targets"
    cause: str = "targets are not of a size that a network's outputs come to"
    advice: str = "Scale the targets to mean 0 and deviation 1, and the outputs back where they are used."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        mean, std, is_of_batch = _scale(trial)
        change = partial(_scaled, mean, std)
        if is_of_batch:
            trial.on_batch.append(lambda batch: with_targets(batch, change))
            return

        def rewrite(call: Any) -> Any:
            call.arguments["target"] = change(call.targets)
            return call

        trial.on_loss.append(rewrite)

    def kind_in(self, trial: Trial) -> str:
        mean, std, _ = _scale(trial)
        size = (mean.square() + std.square()).mean().sqrt()
        return "repair" if not 1 / UNUSUAL < float(size) < UNUSUAL else "setting"


def _scaled(mean: Tensor, std: Tensor, target: Tensor) -> Tensor:
    return ((target - mean) / std).to(target.dtype)


def _scale(trial: Trial) -> tuple[Tensor, Tensor, bool]:
    """Return mean and deviation of the targets, and whether batches hold them: else the loss functions are given."""
    targets = [t for batch in trial.batches if isinstance(t := targets_of(batch), Tensor) and t.is_floating_point()]
    is_of_batch = bool(targets)
    if not targets:
        regressions = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
        calls = [call for call in trial.course.first_calls if call.name in regressions]
        targets = [call.targets for call in calls if call.targets.is_floating_point()]
    if not targets:
        raise NotApplicable("targets are no numbers")
    every = torch.cat([t.detach().float().reshape(len(t), -1) if t.dim() else t.reshape(1, 1) for t in targets])
    every = every[every.isfinite().all(1)]
    if every.numel() < 2 or bool(((every == 0) | (every == 1)).all()):
        raise NotApplicable("targets are no numbers, but classes")
    # One deviation for all columns: what they are to each other stays.
    mean, std = every.mean(), every.std()
    if not std > 0:
        raise NotApplicable("all targets are equal")
    return mean, std, is_of_batch
