"""Some elements of many tensors, as they lie now: copied and compared by a few kernels, without a wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UnreadableError
from ._aside import Aside
from ._bits import as_integers, pieces
from ._devices import home, moved
from ._memory import identity

__all__ = ["Samples", "unlike"]


class Samples:
    """Up to so many elements of each tensor, evenly spread over it.

    Of one in pieces this rank's own; nothing of one that has no elements, or keeps them to itself.

    Args:
        tensors: of any kind; they are read where they lie now, and kept alive while this is.
        count: elements of each.
    """

    def __init__(self, tensors: Sequence[Tensor], count: int = 64) -> None:
        self._tensors = list(tensors)
        self._places = _places(self._tensors)
        self._views: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        with Aside():
            for tensor in tensors:
                for view in _views(tensor, count):
                    self._views.setdefault((view.device, view.dtype), []).append(view)

    def are_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, and lie where they lay."""
        return (
            len(tensors) == len(self._tensors)
            and all(a is b for a, b in zip(tensors, self._tensors, strict=True))
            and _places(tensors) == self._places
        )

    def now(self) -> list[Tensor]:
        """Return copies of the bits, a row for each device and width."""
        with Aside():
            return [torch.cat(views) for views in self._views.values()]


def unlike(before: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
    """Return whether any bit of two lists of rows differs, as a 0-dim bool tensor; nothing is read back."""
    with Aside():
        flags = [(a != b).any() for a, b in zip(before, now, strict=True)]
        if not flags:
            return torch.zeros((), dtype=torch.bool, device="cpu")
        device = home(flags)
        return flags[0] if len(flags) == 1 else torch.stack([moved(flag, device) for flag in flags]).any()


def _places(tensors: Sequence[Tensor]) -> list[int]:
    return [id(t) if t.is_meta else _address(t) for t in tensors]


def _address(tensor: Tensor) -> int:
    return identity(tensor) or id(tensor)  # of one without memory of its own (sparse, in pieces) the latter


def _views(tensor: Tensor, count: int) -> list[Tensor]:
    try:
        found = pieces(tensor.detach() if type(tensor) is torch.nn.Parameter else tensor)
    except (UnreadableError, RuntimeError, NotImplementedError, TypeError, ValueError):
        return []
    return [_view(as_integers(piece), count) for piece in found if piece.numel()]


def _view(piece: Tensor, count: int) -> Tensor:
    if piece.is_contiguous():
        flat = piece.view(-1)
    else:  # a row along its longest dimension: a view of whatever strides
        longest = max(range(piece.dim()), key=piece.size)
        flat = piece[tuple(slice(None) if dim == longest else 0 for dim in range(piece.dim()))]
    return flat[:: max(1, len(flat) // count)][:count]
