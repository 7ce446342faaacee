"""Where elements lie: the only place that asks a tensor for an address."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import repeat
from operator import add, attrgetter, eq, floordiv, le, mul

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UnreadableError
from ._same_kind import SameKind

__all__ = [
    "Lender",
    "Lent",
    "Loan",
    "can_lend",
    "can_lend_all",
    "identities",
    "identity",
    "lend",
    "lend_at_once",
    "lend_in_passing",
    "lend_one",
    "storage_identity",
]

Lent = tuple["array[int]", "array[int]"]
"""Addresses and numbers of elements."""

_CPU = torch.device("cpu")
_FEW = 4
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_STRIDED = frozenset({torch.strided})
_LAYOUT, _IS_NESTED, _IS_CPU = attrgetter("layout"), attrgetter("is_nested"), attrgetter("is_cpu")
_DTYPE = attrgetter("dtype")
_NBYTES = torch.UntypedStorage.nbytes


class Loan:
    """Memory that a kernel may read from end to end while the loan is held.

    Attributes:
        addresses: where each tensor begins, uintp, shape (n,).
        numels: how many elements lie there in a row, int64, shape (n,).
    """

    __slots__ = ("_owners", "addresses", "numels")

    def __init__(self, owners: Sequence[Tensor], lent: Lent | None = None) -> None:
        # Copies that were made for the loan live as long as it does.
        self._owners = owners
        if lent is not None:
            self.addresses: NDArray[np.uintp] = np.frombuffer(lent[0], np.uintp)
            self.numels: NDArray[np.int64] = np.frombuffer(lent[1], np.int64)
            return
        self.addresses = np.fromiter(map(_address, owners), np.uintp, len(owners))
        self.numels = np.fromiter(map(Tensor.numel, owners), np.int64, len(owners))


def can_lend(tensor: Tensor) -> bool:
    """Return whether a real tensor's elements lie in memory in a row, as they are: no gap, no sign or zero put off."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def can_lend_all(tensors: Sequence[Tensor]) -> bool:
    """Return whether `can_lend` holds for all of these, at a fraction of the price of asking each."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and _STRIDED.issuperset(map(_LAYOUT, tensors))
        and not any(map(_IS_NESTED, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor._is_zerotensor, tensors))
    )


def lend(tensors: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device, copy: bool = True) -> Loan:
    """Return the addresses of tensors' elements, for a kernel that believes what it is told.

    Args:
        tensors: of any strides; what is not dense is copied so.
        dtype: that the kernel reads.
        device: that it runs on.
        copy: False for memory that is written to: what is not dense is then refused.

    Raises:
        UnreadableError: a tensor of another dtype or device, one of a kind that has no such memory, one whose storage
            is shorter than its shape says.
    """
    if len(tensors) > _FEW and device == _CPU and (lent := lend_at_once(tensors, dtype=dtype)) is not None:
        return Loan(tuple(tensors), lent)
    owners = []
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.device != device:
            raise UnreadableError(f"a kernel for {dtype} on {device} was given {tensor.dtype} on {tensor.device}")
        if not can_lend(tensor):
            tensor = _copied(tensor, copy)
        owners.append(tensor)
    return Loan(owners)


class Lender:
    """Lends the gradients of the same parameters step after step, as `lend_at_once` does.

    At most steps they are what they were, though each is another tensor, and one call tells so; what is left to ask is
    where they lie.

    Args:
        numels: how many elements each parameter has.
    """

    __slots__ = ("_kind", "_lengths", "_nbytes", "_numels", "_sizes")

    def __init__(self, numels: array[int]) -> None:
        self._numels, self._sizes, self._kind = numels, numels.tolist(), SameKind()
        self._nbytes: list[int] = []
        self._lengths = np.empty(0, np.uint64)

    def lend(self, tensors: Sequence[Tensor]) -> Lent | None:
        """Return addresses and numbers of elements; None where `lend_at_once` gives none.

        Args:
            tensors: one of each parameter.
        """
        if not tensors:
            return None
        if not self._kind.holds(tensors):
            return self._lend_anew(tensors)
        try:
            places = array("Q", list(map(Tensor.data_ptr, tensors)))
            block = tensors[0].untyped_storage()
            first, room = block.data_ptr(), block.nbytes()
            if first <= places[-1] < first + room:  # all in one block,
                begins = np.frombuffer(places, np.uint64)
                ends = begins + self._lengths
                has_room = bool(0 < first <= begins.min() and ends.max() <= first + room)
            else:  # or each in one that it fills
                has_room = 0 not in places and all(
                    map(eq, map(_NBYTES, map(Tensor.untyped_storage, tensors)), self._nbytes)
                )
        except RuntimeError:
            return None
        if has_room:
            return places, self._numels
        return lend_at_once(tensors, dtype=tensors[0].dtype, numels=self._numels)

    def _lend_anew(self, tensors: Sequence[Tensor]) -> Lent | None:
        if not tensors[0].is_cpu:
            return None
        dtype, is_of_size = tensors[0].dtype, list(map(Tensor.numel, tensors)) == self._sizes
        lent = lend_at_once(tensors, dtype=dtype, numels=self._numels if is_of_size else None)
        if lent is not None and is_of_size and self._kind.learn(tensors):
            self._nbytes = [numel * dtype.itemsize for numel in self._sizes]
            self._lengths = np.array(self._nbytes, np.uint64)
        return lent


def lend_one(tensor: Tensor) -> tuple[int, int]:
    """Return address and number of elements of one tensor that `can_lend`, which is to be kept.

    Raises:
        UnreadableError: it has no memory of its own.
    """
    return _address(tensor), tensor.numel()


def lend_in_passing(tensor: Tensor) -> tuple[int, int] | None:
    """Return address and number of elements of a plain tensor on the host whose elements lie in a row; None of any
    other. What `can_lend` and `lend_one` ask, by one call."""
    if (
        type(tensor) not in _PLAIN
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or not tensor.is_contiguous()
        or tensor.is_neg()
        or tensor._is_zerotensor()
    ):
        return None
    numel = tensor.numel()
    try:
        room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        address = tensor.data_ptr()
    except RuntimeError:
        return None
    return (address, numel) if address and room >= numel > 0 else None


def lend_at_once(tensors: Sequence[Tensor], *, dtype: torch.dtype, numels: array[int] | None = None) -> Lent | None:
    """Return addresses and numbers of elements of tensors that lie in the host's memory, in a row each.

    Holds what `lend` holds, by a few calls that take all tensors each, where `lend` asks one after the other. None
    where any of them is of another dtype, is anywhere else, does not lie in a row, or has no memory: `lend` then says
    which, or copies. The tensors must be kept until the addresses were read from.

    Args:
        tensors: the tensors.
        dtype: theirs.
        numels: how many elements they should have, as gradients have as many as their parameters. Those that fill their
            memory with just so many are lent sooner, and without a look at whether a sign was put off.
    """
    if numels is not None and (lent := _whole(tensors, dtype, numels)) is not None:
        return lent
    if numels is None and (lent := _each_whole(tensors, dtype)) is not None:
        return lent
    is_plain = (
        {dtype}.issuperset(map(_DTYPE, tensors))
        and all(map(_IS_CPU, tensors))
        and _PLAIN.issuperset(map(type, tensors))
        and _STRIDED.issuperset(map(_LAYOUT, tensors))
        and not any(map(_IS_NESTED, tensors))
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )
    if not is_plain:
        return None
    try:
        numels = array("q", map(Tensor.numel, tensors))
        rooms = map(_NBYTES, map(Tensor.untyped_storage, tensors))
        ends = map(add, numels, map(Tensor.storage_offset, tensors))
        if not all(map(le, ends, map(floordiv, rooms, repeat(dtype.itemsize)))):
            return None
        addresses = array("Q", map(Tensor.data_ptr, tensors))
    except RuntimeError:
        return None
    # An address of 0 is that of an empty tensor, of one of zeros that were never made, of memory that was given back.
    return None if 0 in addresses else (addresses, numels)


def _each_whole(tensors: Sequence[Tensor], dtype: torch.dtype) -> Lent | None:
    """Return `_whole` of tensors of any sizes, with a look at signs; None where some are views of more."""
    try:
        # The first and the last tell of most that are not.
        for tensor in (tensors[0], tensors[-1]) if tensors else ():
            if tensor.untyped_storage().nbytes() != tensor.numel() * dtype.itemsize:
                return None
        lent = _whole(tensors, dtype, array("q", map(Tensor.numel, tensors)))
    except (RuntimeError, NotImplementedError):
        return None
    return None if lent is None or any(map(Tensor.is_neg, tensors)) else lent


def _whole(tensors: Sequence[Tensor], dtype: torch.dtype, numels: array[int]) -> Lent | None:
    """Return addresses of tensors that are each all that lies in its memory; None where any is not.

    Each question costs a small tensor as much as its arithmetic: those that have no memory answer by an exception, and
    in a memory of just as many elements there is no room for a gap, nor for anything before the first.
    """
    if len(tensors) != len(numels) or not _PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        fits = (
            {dtype}.issuperset(map(_DTYPE, tensors))
            and all(map(_IS_CPU, tensors))
            and all(map(Tensor.is_contiguous, tensors))
            and all(
                map(eq, map(_NBYTES, map(Tensor.untyped_storage, tensors)), map(mul, numels, repeat(dtype.itemsize)))
            )
        )
        addresses = array("Q", map(Tensor.data_ptr, tensors)) if fits else array("Q", (0,))
    except RuntimeError:
        return None
    return None if 0 in addresses else (addresses, numels)


def _copied(tensor: Tensor, allowed: bool) -> Tensor:
    if not allowed:
        raise UnreadableError(f"a {type(tensor).__name__} whose elements do not lie in a row can't be written to")
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        raise UnreadableError(f"a {type(tensor).__name__} of layout {tensor.layout} has no memory of its own in a row")
    tensor = tensor.detach()
    return (tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()).contiguous()


def _address(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    try:
        storage = tensor.untyped_storage()
        room = storage.nbytes() // tensor.element_size() - tensor.storage_offset()
        address = tensor.data_ptr()
    except RuntimeError as error:
        raise UnreadableError(f"a tensor without memory of its own: {error}") from error
    if not address or room < tensor.numel():
        raise UnreadableError(f"a tensor of {tensor.numel()} elements whose memory was given back")
    return address


def identity(tensor: Tensor) -> int:
    """Return a number that tensors share which begin at the same place in memory; never read from."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, TypeError, ValueError):  # without memory yet (lazy), or of a kind that does not tell
        return 0


def identities(tensors: Sequence[Tensor]) -> array[int]:
    """Return `identity` of each; 0 of all where any can't be asked."""
    try:
        return array("Q", list(map(Tensor.data_ptr, tensors)))
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return array("Q", bytes(8 * len(tensors)))


def storage_identity(tensor: Tensor) -> tuple[int, int]:
    """Return (identity, bytes) of a tensor's storage; of wrappers without one, of the tensor."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return id(tensor), tensor.numel() * tensor.element_size()
