"""Pieces of tensors that lie on several ranks though nothing in torch's own types says so, and what stands in for
parameters that are not what they look like."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Piece", "StandIn", "Whole", "largest_piece", "local_of", "real_of", "shape_of", "whole_of"]


@dataclass(frozen=True, eq=False)
class Whole:
    """The tensor that a piece is cut from: a run of its elements, in the order of its memory.

    Attributes:
        shape: of the whole.
        strides: of the whole, which fills its memory.
        start: how many of its elements lie before the piece.
        most: elements of the largest piece on any rank, or a bound on it; the same on all.
        group: process group over whose ranks the pieces are spread.
        num_holders: ranks that hold a piece of it, those with copies among them.
        is_apart: one rank of the group holds all of it and the others nothing, so that what is computed of the whole
            is computed there alone.
    """

    shape: torch.Size
    strides: tuple[int, ...]
    start: int
    most: int
    group: Any
    num_holders: int
    is_apart: bool = False

    def places(self, elements: Tensor, axis: int) -> Tensor:
        """Return where elements, numbered in the order of memory, lie along an axis."""
        return (elements // self.strides[axis]) % self.shape[axis]


class Piece(Tensor):
    """The elements of a gradient that lie on this rank, in a row: what is computed of it is a plain tensor.

    Attributes:
        whole: what it is cut from.
        local: the same memory, as a plain tensor.
        is_absent: the whole has no gradient. Where a rank holds no element it can't know: False.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    whole: Whole
    local: Tensor
    is_absent: bool

    @staticmethod
    def of(local: Tensor, whole: Whole, *, is_absent: bool = False) -> Piece:
        """Return a piece that shares memory with a plain tensor."""
        piece: Piece = Tensor._make_subclass(Piece, local)
        piece.whole, piece.local, piece.is_absent = whole, local, is_absent
        return piece


class StandIn(nn.Parameter):
    """Stands for a parameter whose values or gradient lie elsewhere than in itself; in no optimizer, in no graph.

    Attributes:
        whole: what its elements are a piece of; None where all of them are here.
        is_in_optimizer: an optimizer steps it, though its groups need not show that between steps.
    """

    whole: Whole | None = None
    is_in_optimizer = False
    _behind: weakref.ref[Tensor]

    @property
    def behind(self) -> Tensor:
        """What the optimizer holds; the stand-in itself once that is gone."""
        found = self._behind()
        return self if found is None else found

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        found = self._behind()
        return found is not None and found.requires_grad

    def settle(self) -> None:
        """Lie where the parameter lies now."""

    def part_of(self, value: Any) -> Any:
        """Return the part that is about this parameter of what the optimizer keeps of what it holds."""
        return value


def real_of(p: Tensor) -> Tensor:
    """Return what the optimizer holds of a parameter: itself, but for a stand-in."""
    return p.behind if isinstance(p, StandIn) else p


def whole_of(tensor: Tensor) -> Whole | None:
    """Return what a parameter or a gradient is a piece of; None where it is no piece, or a DTensor, which knows."""
    return tensor.whole if isinstance(tensor, (Piece, StandIn)) else None


def local_of(tensor: Tensor) -> Tensor:
    """Return the elements of a piece, or of a stand-in, as a plain tensor that shares their memory; any other as it
    is."""
    if isinstance(tensor, Piece):
        return tensor.local
    return tensor.detach() if isinstance(tensor, StandIn) else tensor


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of a parameter or a gradient, of the whole where it is a piece."""
    whole = whole_of(tensor)
    if whole is None:
        # DeepSpeed's, of a frozen parameter whose elements are on other ranks.
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))
    return whole.shape


def largest_piece(tensor: Any) -> int:
    """Return how many elements the largest piece on any rank has, or a bound on it; the same on all of them."""
    if (whole := whole_of(tensor)) is not None:
        return whole.most
    if not hasattr(tensor, "placements"):
        return int(tensor.numel())
    shape = list(tensor.shape)
    for i, placement in enumerate(tensor.placements):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            shape[dim] = -(-shape[dim] // tensor.device_mesh.size(i))
    return math.prod(shape)
