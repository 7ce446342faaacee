"""Norms of samples' gradients, and their projections, from the parts that operations add.

Per-sample norms from activations and gradients of outputs alone ("ghost norms"): Goodfellow, "Efficient Per-Example
Gradient Computations", 2015, arXiv 1510.01799; Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", ICLR 2022, arXiv 2110.05679, whose choice between the two ways of a matrix is taken here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ._parts import Each, Outer, Part
from ._uses import Use

__all__ = ["Measured", "measure"]

_BLOCK = 2**22
"""Elements of samples' gradients that are made at a time."""


@dataclass
class Measured:
    """One parameter's share in the samples' gradients.

    Attributes:
        squares: squared norms, shape (B,).
        dots: projections on a gradient, shape (B,).
        places: the projections place by place, shape (B, T); None where it has none.
    """

    squares: Tensor
    dots: Tensor
    places: Tensor | None = None


def measure(uses: Sequence[Use], parts: Sequence[Part], direction: Tensor, size: int) -> Measured | None:
    """Return the squared norms of one parameter's gradients by sample, and their projections.

    None where its uses overlap in a way that is not known.

    Args:
        uses: all uses of the parameter.
        parts: what each adds.
        direction: what is projected on, of the parameter's shape.
        size: B.
    """
    by_key: dict[tuple[object, ...], list[tuple[Use, Part]]] = {}
    for use, part in zip(uses, parts, strict=True):
        by_key.setdefault(use.key, []).append((use, part))
    if len(by_key) > 1 and () in by_key:
        return None  # all of it, and parts of it
    found = [_measure_one(pairs, direction, size) for pairs in by_key.values()]
    if any(one is None for one in found):
        return None
    known = [one for one in found if one is not None]
    places = [one.places for one in known if one.places is not None]
    alike = len({p.shape for p in places}) == 1 and len(places) == len(known)
    return Measured(
        torch.stack([one.squares for one in known]).sum(0),
        torch.stack([one.dots for one in known]).sum(0),
        torch.stack(places).sum(0) if alike else None,
    )


def _measure_one(pairs: Sequence[tuple[Use, Part]], direction: Tensor, size: int) -> Measured | None:
    outers = [part for _, part in pairs if isinstance(part, Outer)]
    if len(outers) == len(pairs):
        return _of_outers([use for use, _ in pairs], outers, direction)
    if outers or len({use.is_transposed for use, _ in pairs}) > 1:
        return None
    eaches = [part for _, part in pairs if isinstance(part, Each)]
    return _of_each(eaches, pairs[0][0].carry(direction), size)


def _of_each(parts: Sequence[Each], direction: Tensor, size: int) -> Measured:
    step = max(1, _BLOCK // max(direction.numel(), 1))
    squares, dots = [], []
    for start in range(0, size, step):
        stop = min(start + step, size)
        rows = torch.stack([part.some(start, stop) for part in parts]).sum(0).reshape(stop - start, -1)
        squares.append(rows.square().sum(1))
        dots.append(rows @ direction.reshape(-1).to(rows.dtype))
    return Measured(torch.cat(squares), torch.cat(dots))


def _of_outers(uses: Sequence[Use], parts: Sequence[Outer], direction: Tensor) -> Measured:
    places = [_project(use, part, direction) for use, part in zip(uses, parts, strict=True)]
    dots = torch.stack([p.sum(1) for p in places]).sum(0)
    told = [p for p, part in zip(places, parts, strict=True) if part.are_places]
    alike = len(told) == len(places) and len({p.shape for p in told}) == 1
    return Measured(_squares(_joined(parts)), dots, torch.stack(told).sum(0) if alike else None)


def _project(use: Use, part: Outer, direction: Tensor) -> Tensor:
    """Return each place's projection, shape (B, T)."""
    matrix = use.carry(direction).to(part.cols.dtype)
    matrix = matrix.t() if use.is_transposed else matrix
    if part.is_chosen:
        return (matrix[part.rows] * part.cols).sum(-1)
    if part.rows.size(-1) > part.cols.size(-1):
        return ((part.cols @ matrix.t()) * part.rows).sum(-1)
    return ((part.rows @ matrix) * part.cols).sum(-1)


def _joined(parts: Sequence[Outer]) -> list[Outer]:
    """Return the parts, those of one kind as one with the places of all."""
    found = []
    for kind in (True, False):
        same = [part for part in parts if part.is_chosen == kind]
        if same:
            found.append(Outer(torch.cat([p.rows for p in same], 1), torch.cat([p.cols for p in same], 1)))
    return found


def _squares(parts: Sequence[Outer]) -> Tensor:
    if len(parts) == 1 and not parts[0].is_chosen:
        rows, cols = parts[0].rows, parts[0].cols
        num, size = rows.size(1), rows.size(2) * cols.size(2)
        if num == 1:
            return rows.square().sum((1, 2)) * cols.square().sum((1, 2))
        if 2 * num * num > size:
            return _squares_of_matrices(rows, cols)
    total = torch.zeros(len(parts[0].cols), dtype=parts[0].cols.dtype, device=parts[0].cols.device)
    for a, b in combinations_with_replacement(parts, 2):
        total += (1 if a is b else 2) * _meeting(a, b)
    return total


def _squares_of_matrices(rows: Tensor, cols: Tensor) -> Tensor:
    step = max(1, _BLOCK // (rows.size(2) * cols.size(2)))
    blocks = zip(rows.split(step), cols.split(step), strict=True)
    return torch.cat([(r.mT @ c).square().sum((1, 2)) for r, c in blocks])


def _meeting(a: Outer, b: Outer) -> Tensor:
    """Return the inner product of two sums of outer products, for each sample."""
    step = max(1, _BLOCK // (a.cols.size(1) * b.cols.size(1)))
    found = []
    for start in range(0, len(a.cols), step):
        rows_a, cols_a, rows_b, cols_b = (x[start : start + step] for x in (a.rows, a.cols, b.rows, b.cols))
        if a.is_chosen and b.is_chosen:
            rows = (rows_a.unsqueeze(2) == rows_b.unsqueeze(1)).to(cols_a.dtype)
        elif a.is_chosen:
            rows = _picked(rows_b, rows_a).mT
        elif b.is_chosen:
            rows = _picked(rows_a, rows_b)
        else:
            rows = rows_a @ rows_b.mT
        found.append((rows * (cols_a @ cols_b.mT)).sum((1, 2)))
    return torch.cat(found)


def _picked(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the chosen elements of each row: shape (B, T of rows, T of chosen)."""
    return rows.gather(2, chosen.unsqueeze(1).expand(-1, rows.size(1), -1))
