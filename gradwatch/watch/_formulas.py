"""What common losses, right and mistaken, make of a batch: so that a rule can tell which one the loss follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..torchside import wide_dtype

__all__ = ["class_scores", "formula_scalars"]

MAX_ELEMENTS = 2**20
"""Outputs larger than that (language models) are left out: what is measured must stay small beside the step."""
_PIECE = 2**13


def formula_scalars(pred: Tensor, target: Tensor) -> dict[str, Tensor | float]:
    """Return losses of this batch by formula; a formula that does not apply is absent, or nan. Reads nothing back.

    For numbers of the predictions' size: `squared_error`, `target_variance` (mean over units of the variance over the
    batch: the squared error of the best constant), and, for one unit, `squared_error_of_pairs` (every prediction
    against every target, as broadcasting (n, 1) against (n,) gives); where they lie between 0 and 1,
    `binary_cross_entropy` of logits, `binary_cross_entropy_twice` (of logits that a sigmoid has made),
    `binary_baseline` (that of the best constant) and `binary_least` (that of the targets themselves).
    For classes, as indices or as rows that sum to 1 (`baseline_loss`: the best constant's): `cross_entropy` of logits,
    `cross_entropy_of_probabilities`, `cross_entropy_over_batch` (softmax over dimension 0) and `cross_entropy_twice`
    (softmax applied twice); of sequences `cross_entropy_shifted` (each position against the next one's index).
    """
    n = pred.shape[0] if pred.ndim else 0
    if n < 2 or pred.numel() > MAX_ELEMENTS or target.is_complex():
        return {}
    if target.numel() == pred.numel() and target.shape[:1] == pred.shape[:1]:
        flat, truth = pred.reshape(n, -1), target.reshape(n, -1)
        found = _of_numbers(flat, truth, wide_dtype(pred.device))
        return found | (_of_rows(flat, truth) if target.is_floating_point() and _is_classes(pred) else {})
    scores = None if target.is_floating_point() else class_scores(pred, target)
    if scores is None:
        return {}
    losses: dict[str, Tensor | float] = {**_of_indices(scores, target.reshape(-1, 1))}
    if pred.ndim == 3 and pred.shape[:2] == target.shape and target.shape[1] > 1:
        # Hugging Face's causal models are given the tokens themselves, and shift them. The labels are moved, which are
        # small: the scores are looked at where they lie.
        moved = torch.nn.functional.pad(target[:, 1:], (0, 1), value=-1)
        losses["cross_entropy_shifted"] = _of_indices(scores, moved.reshape(-1, 1))["cross_entropy"]
    return losses


def class_scores(pred: Tensor, target: Tensor) -> Tensor | None:
    """Return the scores that stand against class indices, as rows: (number of indices, classes); None where sizes don't
    fit. Classes lie in dimension 1, as in torch's losses, or in the last one."""
    if pred.ndim < 2 or not target.numel():
        return None
    if pred.shape[:1] == target.shape[:1] and pred.shape[2:] == target.shape[1:]:
        scores = pred.movedim(1, -1)
    elif pred.numel() == target.numel() * pred.shape[-1]:
        scores = pred
    else:
        return None
    return scores.reshape(-1, scores.shape[-1]) if scores.shape[-1] > 1 else None


def _of_indices(scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    wide, classes = wide_dtype(scores.device), torch.arange(scores.shape[1], device=labels.device)

    def one_hot(first: int, last: int, dim: int) -> Tensor:
        # Labels such as -100 mean "ignore": their row is zero.
        return (labels == classes[first:last] if dim else labels[first:last] == classes).to(wide)

    return _of_classes(scores, one_hot)


def _of_rows(pred: Tensor, truth: Tensor) -> dict[str, Tensor]:
    wide = wide_dtype(pred.device)

    def given(first: int, last: int, dim: int) -> Tensor:
        return truth.narrow(dim, first, last - first).to(wide)

    # Two numbers to be predicted are no two classes.
    sums = torch.stack([(part.to(wide).sum(dim=1) - 1).abs().amax() for part in truth.split(max(1, _PIECE))]).amax()
    are_shares = (sums < 1e-3) & (truth.amin() >= 0)
    found = _of_classes(pred, given)
    found["baseline_loss"] = torch.special.entr(truth.mean(dim=0, dtype=wide).clamp(min=0)).sum()
    return {name: torch.where(are_shares, value, torch.nan) for name, value in found.items()}


def _is_classes(pred: Tensor) -> bool:
    return pred.ndim == 2 and pred.shape[1] > 1


def _of_numbers(pred: Tensor, truth: Tensor, wide: torch.dtype) -> dict[str, Tensor | float]:
    errors, variances, entropies = [], [], []
    for first, last in _ranges(pred, 1):
        p, t = (x[:, first:last].to(wide) for x in (pred, truth))
        errors.append((p - t).square().sum())
        variances.append(t.var(dim=0, correction=0).sum())
        of_logits = [(softplus(x) - x * t).sum() for x in (p, p.sigmoid())]
        share = t.mean(dim=0).clamp(0, 1)
        constant = torch.special.entr(share).sum() + torch.special.entr(1 - share).sum()
        least = (torch.special.entr(t.clamp(0, 1)) + torch.special.entr(1 - t.clamp(0, 1))).sum()
        entropies.append(torch.stack([*of_logits, len(t) * constant, least]))
    variance = torch.stack(variances).sum() / pred.shape[1]
    scalars: dict[str, Tensor | float] = {"target_variance": variance}
    scalars["squared_error"] = torch.stack(errors).sum() / pred.numel()
    inside = (truth.amin() >= 0) & (truth.amax() <= 1)
    names = ("binary_cross_entropy", "binary_cross_entropy_twice", "binary_baseline", "binary_least")
    for name, value in zip(names, torch.stack(entropies).sum(dim=0) / pred.numel(), strict=True):
        scalars[name] = torch.where(inside, value, torch.nan)
    if pred.shape[1] == 1:
        p, t = pred.to(wide), truth.to(wide)
        scalars["squared_error_of_pairs"] = p.var(correction=0) + variance + (p.mean() - t.mean()).square()
    return scalars


def _of_classes(pred: Tensor, rows: Callable[[int, int, int], Tensor]) -> dict[str, Tensor]:
    wide = wide_dtype(pred.device)
    count = torch.zeros((), dtype=wide, device=pred.device)
    sums = {name: count.clone() for name in ("", "_of_probabilities", "_over_batch", "_twice")}
    for first, last in _ranges(pred, 0):
        p, row = pred[first:last].to(wide), rows(first, last, 0)
        count += row.sum()
        sums[""] += (row * p.log_softmax(1)).sum()
        sums["_of_probabilities"] += (row * p.clamp(min=1e-12).log()).sum()
        sums["_twice"] += (row * p.softmax(1).log_softmax(1)).sum()
    for first, last in _ranges(pred, 1):
        sums["_over_batch"] += (rows(first, last, 1) * pred[:, first:last].to(wide).log_softmax(0)).sum()
    count.clamp_(min=1)
    return {f"cross_entropy{name}": -total / count for name, total in sums.items()}


def _ranges(x: Tensor, dim: int) -> Iterator[tuple[int, int]]:
    """Yield where to cut a matrix, so that wide copies of its pieces are small beside it."""
    length = x.shape[dim]
    per_slice = max(1, x.numel() // length)
    step = max(1, _PIECE // per_slice)
    for first in range(0, length, step):
        yield first, min(first + step, length)
