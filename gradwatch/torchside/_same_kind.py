"""Whether thousands of tensors and dictionaries are still what they were, asked by a few calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SameKind", "stamps_of"]

# What `torch.compile` asks of a function's arguments before it runs compiled code again. Private: without it nothing is
# known to be the same, and who asks looks for itself.
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
_FEW = 4

# Private, too: the interpreter's own count of what is written to a dictionary, by which compiled code knows it again.
_stamp: Callable[[Any], int] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "dict_version", None
)


def stamps_of(dicts: Iterable[Any]) -> list[int] | None:
    """Return a number for each dictionary that no other one ever has, nor this one once it holds anything else.

    None where the interpreter keeps no such numbers, or one of them is no dictionary. A dictionary that was given what
    it holds already may keep its number.
    """
    if _stamp is None:
        return None
    try:
        return list(map(_stamp, dicts))
    except Exception:  # no dictionary, or an interpreter that can watch no more of them
        return None


class SameKind:
    """Knows tensors of torch's own classes again by class, dtype, device, layout, sizes, strides, what is put off (a
    sign, zeros) and whether they require a gradient.

    Where something of a thread has changed (inference mode, a mode of torch's own dispatcher) it says that they are not
    the same. Holds no tensor.
    """

    __slots__ = ("_check", "_count", "_num_misses")

    def __init__(self) -> None:
        self._check: Any = None
        self._count = self._num_misses = 0

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are of the kind of those that were learnt, one by one. None among them is an error."""
        if self._check is not None and len(tensors) == self._count and self._check(*tensors):
            self._num_misses = 0
            return True
        self._num_misses += 1
        return False

    def learn(self, tensors: Sequence[Tensor]) -> bool:
        """Remember the kind of these, after `holds` said no, in the place of what was known; return whether that was
        done: of those that are others at each look ever more seldom."""
        self._check = None
        # To learn costs as much as to look two or three times.
        if _Guards is None or len(tensors) < _FEW or self._num_misses & (self._num_misses - 1):
            return False
        try:
            self._check = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        except Exception:  # a tensor of a kind that has no strides
            self._check = None
        self._count = len(tensors)
        return self._check is not None

    def forget(self) -> None:
        """Know nothing any more."""
        self._check = None
