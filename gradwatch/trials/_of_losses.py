"""Changes of the loss: how it reduces, what it takes its inputs for, which of its terms count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._change import Change, NotApplicable
from ._losses import LossCall
from ._trial import Trial, main_call

__all__ = ["CrossEntropy", "Logits", "MainTerm", "MatchedShapes", "Mean", "Negated", "RobustLoss", "SumOverSample"]

ELEMENTWISE = frozenset(
    ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
)


def _main(trial: Trial) -> LossCall:
    call = main_call(trial.course.first_calls)
    if call is None:
        raise NotApplicable("no loss function of torch's is called")
    return call


@dataclass(frozen=True, repr=False)
class Mean(Change):
    """A loss that is summed over the batch is averaged."""

    name: str = "loss averaged"
    kind: str = "repair"
    cause: str = "the loss is summed over the batch instead of averaged, and the steps are as many times too large"
    advice: str = 'Use `reduction="mean"`, or divide the learning rate by the batch size.'
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        if _main(trial).reduction != "sum":
            raise NotApplicable("the loss is not summed")
        trial.on_loss.append(lambda call: _reduced(call, "sum", "mean"))


def _reduced(call: LossCall, before: str, after: str) -> LossCall:
    if call.reduction == before:
        call.arguments["reduction"] = after
    return call


@dataclass(frozen=True, repr=False)
class SumOverSample(Change):
    """A loss that is averaged over all elements is summed over those of a sample, and averaged over samples."""

    name: str = "loss summed over a sample"
    kind: str = "setting"
    cause: str = "the loss is averaged over the elements of a sample, too, and outweighed by its other terms"
    advice: str = (
        "Sum the loss over the elements of a sample, average it over samples, or lower the other terms' weights."
    )
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        call = _main(trial)
        if call.name not in ELEMENTWISE or call.reduction != "mean" or call.outputs[0].numel() < 2:
            raise NotApplicable("the loss is not averaged over elements of samples")
        if not _has_other_terms(trial, call):
            raise NotApplicable("the loss has no other terms: another learning rate does the same")
        size = call.outputs[0].numel()
        trial.on_loss.append(lambda c: _summed(c, size))


def _summed(call: LossCall, size: int) -> LossCall:
    if call.name in ELEMENTWISE and call.reduction == "mean" and call.outputs[0].numel() == size:
        return _Times(call.name, call.arguments, factor=float(size))
    return call


class _Times(LossCall):
    def __init__(self, name: str, arguments: dict[str, object], *, factor: float) -> None:
        super().__init__(name, arguments)
        self._factor = factor

    def run(self) -> Tensor:
        found: Tensor = super().run() * self._factor
        return found


def _has_other_terms(trial: Trial, call: LossCall) -> bool:
    value, loss = call.value, trial.course.first_loss
    if not isinstance(value, Tensor):
        return False
    alone = float(value.detach()) if value.numel() == 1 else float(value.detach().sum() / value.shape[0])
    mean = alone if value.numel() == 1 else float(value.detach().mean())
    # Its sign may be another: a term that is negated is no second one.
    return all(abs(abs(each) - abs(loss)) > 1e-3 * max(abs(loss), abs(each)) for each in (alone, mean))


@dataclass(frozen=True, repr=False)
class MainTerm(Change):
    """The loss without its other terms: the largest call of a loss function alone."""

    name: str = "main term of the loss alone"
    kind: str = "part"
    cause: str = "the other terms of the loss outweigh it, or work against it"
    advice: str = "Look at sign and weight of the other terms: penalties, balancing, KL."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        if not _has_other_terms(trial, _main(trial)):
            raise NotApplicable("the loss has one term")
        trial.only_main = True


@dataclass(frozen=True, repr=False)
class Logits(Change):
    """A loss that takes logits, or logarithms, gets them where it was given probabilities."""

    name: str = "logits for the loss"
    kind: str = "repair"
    cause: str = "the loss takes logits and is given probabilities: softmax or sigmoid is applied twice"
    advice: str = "Leave out the softmax or sigmoid before the loss."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        call = _main(trial)
        if call.name not in ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"):
            raise NotApplicable("the loss takes no logits")
        if not _are_probabilities(call):
            raise NotApplicable("it is given logits")
        trial.on_loss.append(_as_logits)


def _are_probabilities(call: LossCall) -> bool:
    z = call.outputs.detach().float()
    if not z.numel() or not bool(((z >= 0) & (z <= 1)).all()):
        return False
    if call.name == "binary_cross_entropy_with_logits":
        return True
    axis = 1 if z.dim() > 1 else 0
    return bool(((z.sum(axis) - 1).abs() < 1e-3).all())


def _as_logits(call: LossCall) -> LossCall:
    if call.name == "binary_cross_entropy_with_logits":
        call.arguments["input"] = torch.logit(call.outputs, 1e-6)
    elif call.name in ("cross_entropy", "nll_loss"):
        call.arguments["input"] = call.outputs.clamp(min=1e-12).log()
    return call


@dataclass(frozen=True, repr=False)
class MatchedShapes(Change):
    """Targets in the shape of the outputs."""

    name: str = "targets in the outputs' shape"
    kind: str = "repair"
    cause: str = "outputs and targets are of different shapes, and every output is compared with every target"
    advice: str = "Give both the same shape before the loss: `outputs.squeeze(1)`, or `targets.unsqueeze(1)`."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        call = _main(trial)
        if call.name not in ELEMENTWISE or not _are_misshapen(call):
            raise NotApplicable("shapes are equal")
        trial.on_loss.append(_matched)


def _are_misshapen(call: LossCall) -> bool:
    return call.outputs.shape != call.targets.shape and call.outputs.numel() == call.targets.numel()


def _matched(call: LossCall) -> LossCall:
    if call.name in ELEMENTWISE and _are_misshapen(call):
        call.arguments["target"] = call.targets.reshape(call.outputs.shape)
    return call


@dataclass(frozen=True, repr=False)
class RobustLoss(Change):
    """A squared error that grows no faster than the error where that is large."""

    name: str = "robust loss"
    kind: str = "part"
    cause: str = "a few targets are far off, and their squared errors are all of the gradient"
    advice: str = "Look for outliers among the targets; or use `smooth_l1_loss`."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        call = _main(trial)
        if call.name != "mse_loss":
            raise NotApplicable("the loss is no squared error")
        trial.on_loss.append(_robust)


def _robust(call: LossCall) -> LossCall:
    if call.name != "mse_loss":
        return call
    kept: dict[str, Any] = {
        name: call.arguments[name] for name in ("input", "target", "reduction") if name in call.arguments
    }
    return LossCall("smooth_l1_loss", kept)


@dataclass(frozen=True, repr=False)
class CrossEntropy(Change):
    """Classes that are learnt by a squared or absolute error are learnt by cross-entropy."""

    name: str = "cross-entropy for classes"
    kind: str = "part"
    cause: str = "the loss is one for numbers, and the targets are classes"
    advice: str = "Use `cross_entropy` on logits."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        call = _main(trial)
        if call.name not in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"):
            raise NotApplicable("the loss is none for numbers")
        if not _are_one_hot(call):
            raise NotApplicable("the targets are no classes")
        trial.on_loss.append(_cross_entropy)


def _are_one_hot(call: LossCall) -> bool:
    y = call.targets.detach()
    if y.dim() != 2 or y.shape[1] < 2 or y.shape != call.outputs.shape:
        return False
    return bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())


def _cross_entropy(call: LossCall) -> LossCall:
    if not _are_one_hot(call):
        return call
    return LossCall("cross_entropy", {"input": call.outputs, "target": call.targets.float()})


@dataclass(frozen=True, repr=False)
class Negated(Change):
    """The loss with the other sign."""

    name: str = "loss negated"
    kind: str = "part"
    cause: str = "the sign of the loss is wrong"
    advice: str = "Look at the sign of the loss."
    is_of_loss: bool = True

    def apply(self, trial: Trial) -> None:
        trial.sign = -1.0
