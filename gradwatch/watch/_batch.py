"""What rules need of batches, outputs and targets, reduced to scalars while they are at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..torchside import Aside, children, declassed, find, tensors_of, values, walk, wide_dtype
from ._formulas import formula_scalars
from ._guard import Guard
from ._loss_graph import form_scalars
from ._numbers import Missed, Numbers, Scalars
from ._prediction import Forward, Prediction, blocks, extremes, predicted, row_sums
from ._target_numbers import repeats, tail

__all__ = ["batch_scalars", "holds_targets", "look", "num_samples", "reduced", "split_batch", "validation_inputs"]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_OUTPUT_KEYS = ("logits", "preds", "pred", "predictions", "outputs", "output", "y_hat")


def num_samples(batch: Any) -> int:
    """Return the length of the first dimension of the batch's first tensor that has one (packed sequences: their
    number); of its first array where it holds no tensor; 0 where there is none. Never raises.
    """
    if type(batch) is Forward:
        return batch.num_samples
    return next((n for kind in (Tensor, np.ndarray) for n in _lengths(batch, kind) if n is not None), 0)


def _lengths(batch: Any, kind: type) -> Iterator[int | None]:
    for _, item in walk(batch, objects=True, stop_at=(PackedSequence, np.ndarray)):
        if issubclass(type(item), PackedSequence) or issubclass(type(item), kind):
            yield _length(item)


def _length(item: Any) -> int | None:
    # Of tensors of another library's making anything may fail.
    try:
        if isinstance(item, PackedSequence):
            return int(item.batch_sizes[0])  # always on the host
        if isinstance(item, np.ndarray):
            return int(item.shape[0]) if item.ndim else None
        return int(item.size(0)) if item.dim() else None
    except Exception:
        return None


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch in one of the usual forms: a pair, or something with labels by name (a
    mapping, a dataclass, an object with attributes)."""
    if issubclass(type(batch), (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    held = dict(children(batch, objects=True))
    key = next((k for k in _TARGET_KEYS if k in held), None)
    return (batch, None) if key is None else ({k: v for k, v in held.items() if k != key}, held[key])


def holds_targets(batch: Any, size: int) -> bool:
    """Return whether a batch in one of the usual forms holds targets of so many elements."""
    target = _first(split_batch(batch)[1], lambda t: t.numel() > 0)
    return target is not None and target.numel() == size


def reduced(outputs: Any, kept: int = 0) -> Prediction | None:
    """Return what is kept of a model's outputs; None where no tensor among them looks like a prediction."""
    if type(outputs) is Prediction:
        return outputs
    found = _prediction(outputs)
    return None if found is None else predicted(found, kept)


def _prediction(outputs: Any) -> Tensor | None:
    """Return the tensor that looks like a prediction, as it is: its graph tells how it was made."""
    named = find(outputs, *_OUTPUT_KEYS)
    outputs = outputs if named is None else named
    return _first(outputs, lambda t: t.dim() > 0 and t.is_floating_point() and t.numel() > 0, with_graph=True)


def _first(tree: Any, want: Callable[[Tensor], bool], *, with_graph: bool = False) -> Tensor | None:
    for _, tensor in tensors_of(tree, objects=True):
        # Of tensors of another library's making anything may fail.
        with suppress(Exception):
            if want(tensor):
                return tensor if with_graph else declassed(tensor)
    return None


def validation_inputs(batch: Any, guard: Guard) -> dict[str, float]:
    """Return size and spread of a validation batch's inputs, to stand beside those of training. Reads them back."""
    with guard("validation inputs"), torch.no_grad():
        x = _float_input(split_batch(batch)[0])
        if x is not None:
            numbers = Numbers(guard.miss)
            numbers.ask("the validation inputs", (_spread, _range), x)
            return {f"val_{name}": float(value) for name, value in numbers.found.items()}
    return {}


def _float_input(inputs: Any) -> Tensor | None:
    return _first(inputs, lambda t: t.is_floating_point() and t.numel() > 1)


def batch_scalars(
    batch: Any = None, outputs: Any = None, targets: Any = None, *, missed: Missed | None = None
) -> Scalars:
    """Return what can be said of this batch in numbers (see the vocabulary in docs/rules.md). Reads nothing back.

    Args:
        batch: inputs, or a pair (inputs, targets), or something with labels by name; or a `Forward`, which has it all.
        outputs: the model's predictions, or something that holds them; or a `Prediction`.
        targets: what they are compared with; taken from the batch where not given.
        missed: told of each number that can't be measured; the others are measured all the same.

    Returns:
        name -> float or 0-dim tensor; a name that can't be told is absent.
    """
    if type(batch) is Forward:
        return dict(batch.numbers or {})
    inputs, found = split_batch(batch)
    x = _float_input(inputs)
    target = _first(found if targets is None else targets, lambda t: t.numel() > 0)
    numbers = Numbers(missed)
    with torch.no_grad():
        if x is not None:
            numbers.ask("the inputs", (_size, _spread, _range), x)
        prediction = None
        try:
            prediction = reduced(outputs)
        except Exception as error:
            numbers.miss("the outputs", error.with_traceback(None))
        if prediction is not None:
            numbers.found |= prediction.scalars
            for what, why in prediction.missed:
                numbers.miss(what, why)
        if target is not None:
            # Rows of several lengths have no shape, and are no matrix.
            ways = (_target_range, _target_kind, _target_row_sums, _classes, _target_whole, repeats, tail)
            numbers.ask("the targets", ways[:1] if target.is_nested else ways, target, prediction)
            if x is not None and not (x.is_nested or target.is_nested):
                numbers.ask("inputs and targets", (_stand_in_inputs,), x, target)
            tokens = _first(inputs, lambda t: _is_integer(t) and t.numel() > 1) if x is None else None
            if tokens is not None:
                numbers.ask("inputs and targets", (_shifts,), tokens, target)
            pred = _prediction(outputs) if prediction is not outputs else prediction and prediction.values
            pred = None if pred is None else declassed(pred)
            if pred is not None and not pred.is_nested and not target.is_nested:
                numbers.ask("outputs and targets", (formula_scalars,), pred, target)
    return numbers.found


def look(batch: Any, outputs: Any, guard: Guard | None = None, *, sampled: bool = True) -> Forward:
    """Return what is kept of a forward pass, of its end: how many samples, and on sampled steps its numbers.

    Args:
        batch, outputs: as for `batch_scalars`.
        guard: that is told of what can't be read; nobody is where None.
        sampled: take the numbers too.
    """
    numbers, part, missed = None, "numbers of the batch", None if guard is None else guard.miss
    if sampled and (guard is None or guard.ok(part)):
        with suppress(Exception) if guard is None else guard(part), Aside():
            numbers = {**batch_scalars(batch, outputs, missed=missed), **form_scalars(find(outputs, "loss"))}
    return Forward(num_samples(batch), numbers)


def _size(x: Tensor) -> Scalars:
    return {"batch_size": float(x.size(0))} if x.dim() else {}


def _spread(x: Tensor) -> Scalars:
    stored, zeros = values(x)
    stored = stored.float()
    if not zeros:
        std, mean = torch.std_mean(stored, correction=0)
        return {"input_mean": mean, "input_std": std}
    num = stored.numel() + zeros
    mean = stored.sum() / num
    return {"input_mean": mean, "input_std": (((stored - mean).square().sum() + zeros * mean.square()) / num).sqrt()}


def _range(x: Tensor) -> Scalars:
    low, high = extremes(x)
    return {"input_absmax": torch.maximum(-low, high)}


def _target_range(target: Tensor, pred: Prediction | None) -> Scalars:
    low, high = extremes(target)
    return {"target_min": low, "target_max": high}


def _is_integer(target: Tensor) -> bool:
    return not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)


def _target_kind(target: Tensor, pred: Prediction | None) -> Scalars:
    scalars: Scalars = {"target_is_integer": float(_is_integer(target))}
    if not _is_integer(target) and pred is not None and pred.shape != target.shape and _broadcasts(pred, target):
        scalars["shape_mismatch"] = 1.0
    return scalars


def _target_row_sums(target: Tensor, pred: Prediction | None) -> Scalars:
    if _is_integer(target) or target.ndim < 2 or target.shape[1] < 2:
        return {}
    low, high = row_sums(target)
    return {"target_row_sum_min": low, "target_row_sum_max": high}


def _classes(target: Tensor, pred: Prediction | None) -> Scalars:
    # Class indices: as many as the prediction has rows of scores, along its dimension 1 or its last.
    if pred is None or not _is_integer(target) or pred.ndim < 2:
        return {}
    if pred.shape[0] == target.shape[0] and pred.shape[2:] == target.shape[1:]:
        k = int(pred.shape[1])
    else:
        k = int(pred.shape[-1]) if pred.numel() == target.numel() * pred.shape[-1] else 0
    return {"num_classes": float(k), "expected_initial_loss": math.log(k), **_entropy(target, k)} if k > 1 else {}


def _entropy(target: Tensor, num_classes: int) -> Scalars:
    counts = torch.zeros(num_classes + 1, dtype=wide_dtype(target.device), device=target.device)
    for part in blocks(target.reshape(-1), keep=-1):
        # Labels such as -100 mean "ignore": they fall into one bin more, that is not counted. bincount would read back.
        inside = torch.where((part >= 0) & (part < num_classes), part, num_classes).long()
        counts.index_add_(0, inside, torch.ones(len(inside), dtype=counts.dtype, device=counts.device))
    counts = counts[:num_classes]
    total = counts.sum().clamp(min=1)
    share = counts / total
    entropy = -torch.special.xlogy(share, share).sum()
    # A batch holds less than all there is to guess: the entropy of few draws is too low (Miller and Madow, 1955).
    seen = (counts > 0).sum()
    level = (entropy + (seen - 1) / (2 * total)).clamp(max=math.log(num_classes))
    # Fewer draws than classes (a large vocabulary) tell next to nothing of the shares.
    known = total >= num_classes
    return {"target_entropy": entropy, "baseline_loss": torch.where(known, level, torch.nan)}


def _target_whole(target: Tensor, pred: Prediction | None) -> Scalars:
    """Whether numbers that a model is to predict are whole ones."""
    if pred is None or pred.numel() != target.numel() or target.is_complex() or target.dtype == torch.bool:
        return {}
    return {
        "target_is_whole": 1.0
        if _is_integer(target)
        else (target == target.round()).all().to(wide_dtype(target.device))
    }


def _shifts(tokens: Tensor, target: Tensor) -> Scalars:
    """Share of targets that are the very tokens of the input, so many places further on."""
    if tokens.ndim != 2 or target.numel() != tokens.numel() or tokens.shape[1] < 8 or not _is_integer(target):
        return {}
    target, length = target.reshape(tokens.shape), tokens.shape[1]
    found: Scalars = {}
    for shift, name in SHIFTS.items():
        y = target[:, max(-shift, 0) : length - max(shift, 0)]
        x = tokens[:, max(shift, 0) : max(shift, 0) + y.shape[1]]
        told = y >= 0
        found[name] = ((x == y) & told).sum() / told.sum().clamp(min=1)
    return found


SHIFTS = {-1: "target_at_minus_1", 0: "target_at_0", 1: "target_at_1", 2: "target_at_2"}


def _stand_in_inputs(x: Tensor, target: Tensor) -> Scalars:
    """Whether numbers to be predicted stand in the inputs as they are: as a column, or at the end of a sequence.

    Inputs are (samples, columns) or (samples, time, channels). What makes up more than half of them is to be
    reconstructed, and stands there by right; so does what lies further back in a sequence and is to be remembered, and
    what every column holds: it is to be copied.
    """
    if target.layout != torch.strided or x.layout != torch.strided or x.ndim not in (2, 3):
        return {}
    n, is_sequence = len(x), x.ndim == 3
    if not target.is_floating_point() or target.ndim == 0 or len(target) != n or n < LEAST_ROWS:
        return {}
    y = (target[..., 0] if target.ndim == 3 else target).reshape(n, -1)
    places = x.shape[1]
    if not 0 < y.shape[1] <= places // 2 or (not is_sequence and y.shape[1] > 1) or x.numel() > MOST_COMPARED:
        return {}
    y = y.to(x.dtype)
    there = x[:, places - y.shape[1] :] == y[:, :, None] if is_sequence else (x == y)[:, None]
    varied = y.amax() > y.amin()
    same = there.all(dim=0).all(dim=0)
    found = same.any() & varied if is_sequence else same.any() & ~same.all() & varied
    return {"target_in_inputs": found.to(wide_dtype(x.device))}


LEAST_ROWS = 8
MOST_COMPARED = 2**20
"""Elements of inputs above which they are not searched."""


def _broadcasts(a: Prediction, b: Tensor) -> bool:
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        return False
    return math.prod(shape) > max(a.numel(), b.numel())
