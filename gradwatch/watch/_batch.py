"""What rules need of batches, outputs and targets, reduced to scalars while they are at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._formulas import formula_scalars

__all__ = ["batch_scalars", "num_samples", "split_batch"]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_OUTPUT_KEYS = ("logits", "preds", "pred", "predictions", "outputs", "output", "y_hat")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        value = {k: getattr(value, k) for k in value.__dataclass_fields__}
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def num_samples(batch: Any) -> int:
    """Return the length of the first dimension of the batch's first tensor that has one; 0 where there is none."""
    return next((int(t.shape[0]) for t in _tensors(batch) if t.ndim), 0)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch in one of the usual forms: a pair, or a mapping with labels."""
    if isinstance(batch, Mapping):
        key = next((k for k in _TARGET_KEYS if k in batch), None)
        return {k: v for k, v in batch.items() if k != key}, batch.get(key) if key else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def _prediction(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Mapping):
        outputs = next((outputs[k] for k in _OUTPUT_KEYS if k in outputs), outputs)
    found = [t for t in _tensors(outputs) if t.ndim >= 1 and t.is_floating_point()]
    return found[0].detach() if found else None


def batch_scalars(batch: Any = None, outputs: Any = None, targets: Any = None) -> dict[str, Tensor | float]:
    """Return what can be said of this batch in numbers (see the vocabulary in docs/rules.md). Reads nothing back.

    Args:
        batch: inputs, or a pair (inputs, targets), or a mapping with labels.
        outputs: the model's predictions, or something that holds them.
        targets: what they are compared with; taken from the batch where not given.

    Returns:
        name -> float or 0-dim tensor; a name that can't be told is absent.
    """
    inputs, found = split_batch(batch)
    targets = found if targets is None else targets
    prediction = _prediction(outputs)
    target = next((t.detach() for t in _tensors(targets)), None)
    scalars: dict[str, Tensor | float] = {}
    with torch.no_grad():
        floats = [t.detach() for t in _tensors(inputs) if t.is_floating_point() and t.numel() > 1]
        if floats:
            scalars |= _input_scalars(floats[0])
        if prediction is not None and prediction.numel():
            scalars |= _output_scalars(prediction)
        if target is not None and target.numel():
            scalars |= _target_scalars(target, prediction)
            if prediction is not None:
                scalars |= formula_scalars(prediction, target)
    return scalars


def _input_scalars(x: Tensor) -> dict[str, Tensor | float]:
    std, mean = torch.std_mean(x.float(), correction=0)
    low, high = torch.aminmax(x)
    absmax = torch.maximum(-low, high).double()
    return {"input_mean": mean, "input_std": std, "input_absmax": absmax, "batch_size": float(x.shape[0])}


def _output_scalars(pred: Tensor) -> dict[str, Tensor | float]:
    low, high = torch.aminmax(pred)
    scalars: dict[str, Tensor | float] = {"output_min": low.double(), "output_max": high.double()}
    scalars["output_units"] = float(pred.numel() // max(pred.shape[0], 1))
    if pred.shape[0] > 1:
        scalars["output_batch_variance"] = pred.double().reshape(len(pred), -1).var(dim=0, correction=0).amax()
    if pred.ndim >= 2 and pred.shape[1] > 1:
        low, high = torch.aminmax(pred.double().sum(dim=1))
        scalars |= {"output_row_sum_min": low, "output_row_sum_max": high}
    return scalars


def _target_scalars(target: Tensor, pred: Tensor | None) -> dict[str, Tensor | float]:
    low, high = torch.aminmax(target)
    scalars: dict[str, Tensor | float] = {"target_min": low.double(), "target_max": high.double()}
    is_integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    scalars["target_is_integer"] = float(is_integer)
    if not is_integer:
        if target.ndim >= 2 and target.shape[1] > 1:
            low, high = torch.aminmax(target.double().sum(dim=1))
            scalars |= {"target_row_sum_min": low, "target_row_sum_max": high}
        if pred is not None and pred.shape != target.shape and _broadcasts(pred, target):
            scalars["shape_mismatch"] = 1.0
        return scalars
    # Class indices: one dimension fewer than the prediction, whose dimension 1 (or last) counts the classes.
    if pred is not None and pred.ndim == target.ndim + 1 and pred.ndim >= 2:
        k = int(pred.shape[1] if pred.shape[0] == target.shape[0] and pred.shape[2:] == target.shape[1:] else 0)
        k = k or int(pred.shape[-1])
        if k > 1:
            scalars |= {"num_classes": float(k), "expected_initial_loss": math.log(k)}
            scalars |= _entropy(target, k)
    return scalars


def _entropy(target: Tensor, num_classes: int) -> dict[str, Tensor | float]:
    flat = target.reshape(-1)
    # Labels such as -100 mean "ignore": they fall into one bin more, that is not counted. bincount would read back.
    inside = torch.where((flat >= 0) & (flat < num_classes), flat, num_classes).long()
    counts = torch.zeros(num_classes + 1, dtype=torch.float64, device=flat.device)
    counts.index_add_(0, inside, torch.ones(len(inside), dtype=torch.float64, device=flat.device))
    share = counts[:num_classes] / counts[:num_classes].sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return {"target_entropy": entropy, "baseline_loss": entropy}


def _broadcasts(a: Tensor, b: Tensor) -> bool:
    try:
        shape = torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        return False
    return math.prod(shape) > max(a.numel(), b.numel())
