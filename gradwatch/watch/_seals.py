"""Whether gradients are still those that were looked at, told without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from weakref import ref

from torch import Tensor

__all__ = ["Seals"]

_GRAD, _VERSION = attrgetter("grad"), attrgetter("_version")
_DEREFERENCED = ref.__call__


class Seals:
    """The gradients of some parameters as they are now: which tensors, and how often each was written to.

    Holds no gradient. What is written past the version counters (`p.grad.data`, a kernel of one's own) breaks no seal.

    Args:
        params: the parameters.
        grads: of those that have one, where somebody has just listed them.
    """

    __slots__ = ("_params", "_refs", "_versions")

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> None:
        self._params = params
        if grads is None:
            grads = [g for g in map(_GRAD, params) if g is not None]
        self._refs = list(map(ref, grads))
        self._versions = _versions(grads)

    @property
    def broken(self) -> bool:
        """Whether any of them is another tensor than then, is gone or new, or was written to since."""
        return self.are_broken_by([g for g in map(_GRAD, self._params) if g is not None])

    def are_broken_by(self, now: Sequence[Tensor]) -> bool:
        """Return what `broken` does, where these are the parameters' gradients now."""
        if len(now) != len(self._refs) or not all(map(is_, now, map(_DEREFERENCED, self._refs))):
            return True
        try:
            return list(map(_VERSION, now)) != self._versions
        except RuntimeError:
            return _versions(now) != self._versions


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # an inference tensor has none
        return [-1 if t.is_inference() else t._version for t in tensors]
