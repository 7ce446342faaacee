"""Whether gradients are still those that were looked at, told without reading them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter, is_

from torch import Tensor

from ..torchside import identities

__all__ = ["FEW", "Seals"]

_GRAD, _VERSION = attrgetter("grad"), attrgetter("_version")
FEW = 3
"""So many gradients are looked at to find out whether any were reset."""


class Seals:
    """The gradients of some parameters as they are now: which tensors, where, and how often each was written to.

    Holds no gradient, and nothing that the garbage collector has to walk through: weak references to thousands of
    gradients at every step would wake it in each. Another tensor may come to lie where a gradient was, or to be the
    object that was its; to be both, and as often written to, it would have to be the same.
    What is written past the version counters (`p.grad.data`, a kernel of one's own) breaks no seal.

    Args:
        params: the parameters.
        grads: of those that have one, where somebody has just listed them.
        places: `identities` of these, where somebody has just asked.
    """

    __slots__ = ("_ids", "_params", "_places", "_versions")

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
        places: array[int] | None = None,
    ) -> None:
        self._params = params
        if grads is None:
            grads = [g for g in map(_GRAD, params) if g is not None]
        # Lists of numbers are made and compared sooner than arrays of them.
        self._ids = list(map(id, grads))
        self._places = identities(grads) if places is None else places
        try:
            self._versions = list(map(_VERSION, grads))
        except RuntimeError:
            self._versions = _versions(grads)

    @property
    def broken(self) -> bool:
        """Whether any of them is another tensor than then, is gone or new, or was written to since."""
        return self.are_broken_by([g for g in map(_GRAD, self._params) if g is not None])

    def are_broken_by(self, now: Sequence[Tensor]) -> bool:
        """Return what `broken` does, where these are the parameters' gradients now."""
        if list(map(id, now)) != self._ids:
            return True
        try:
            versions = list(map(_VERSION, now))
        except RuntimeError:
            versions = _versions(now)
        return versions != self._versions or identities(now) != self._places

    def are_added_to(self, earlier: Seals, times: int) -> bool | None:
        """Return whether the first few are gradients that lay there earlier, each written to just so often since.

        None where these are of other parameters, or their writes are not counted.
        """
        mine, other = self._params[:FEW], earlier._params[:FEW]
        if len(mine) != len(other) or not all(map(is_, mine, other)):
            return None
        versions, before = self._versions[:FEW], earlier._versions[:FEW]
        if -1 in versions or -1 in before:
            return None
        same = self._places[:FEW] == earlier._places[:FEW]
        return same and versions == [version + times for version in before]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    # An inference tensor has none.
    return [-1 if t.is_inference() else t._version for t in tensors]
