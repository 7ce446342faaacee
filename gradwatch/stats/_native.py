"""One-pass kernels for the CPU, compiled once per machine by the C compiler that is there, if one is.

Torch makes a pass over memory for each statistic and has no fast histogram. The few loops of `_native.c` read a tensor
once, at the speed of memory: a histogram of exponents takes a quarter of `bincount`'s time. Without a compiler, with
`GRADWATCH_NATIVE=0`, and in distributed runs (whose ranks must agree to the last bit) torch does all of it.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UnreadableError
from ..torchside import (
    Lent,
    Loan,
    are_several,
    can_lend,
    can_lend_all,
    lend,
    lend_at_once,
    lend_in_passing,
    lend_one,
    world_size,
)
from ._library import NoLibraryError, is_compiled, library
from ._reference import agrees, reference

__all__ = [
    "WORTH_MOMENTS",
    "WORTH_THREADS",
    "Native",
    "moments_in_passing",
    "native",
    "native_at_hand",
    "native_fault",
    "native_for",
    "native_lent",
    "native_state",
]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_AT_ONCE = 1024
"""Tensors whose histograms are made at once: of many they are larger than what they count."""
_KERNELS = {"squares": 1, "moments": 5, "everything": 517, "histograms": 512, "moved": 2}
"""The kernels, and how many numbers each writes for a tensor."""
WORTH_MOMENTS = 1 << 13
"""Elements of a single tensor, 256 more than it has, from which on its moments are worth a compiler;"""
WORTH_THREADS = 1 << 20
"""and above which several threads of torch read it sooner, where there are."""
_CPU = torch.device("cpu")
_IS_CPU = attrgetter("is_cpu")
_Five = ctypes.c_double * 5
_RARELY = 1024
_CHEAP, _FEW = 1 << 16, 64
_LASTS = 128
"""So many small measurements tell of a run that lasts: worth the second that a compiler takes, once."""
_faults: list[str] = []


class Native:
    """The compiled kernels, for CPU tensors of one dtype: float32, bfloat16 or float64; of any shape and strides.

    What they return is compared with torch at some of the calls (the first, the second, the fourth, ..., then one in
    1,024). Where they differ by more than rounding, torch's numbers are returned and the kernels are not used again.

    Attributes:
        fault: how they were found wrong; empty while they were not.
    """

    def __init__(self, library: Any) -> None:
        self.fault = ""
        self._calls: dict[str, int] = {}
        self._functions = {}
        for name in _KERNELS:
            function = getattr(library, f"gradwatch_{name}")
            function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
            function.restype = None
            self._functions[name] = function
        self._functions["norms"] = library.gradwatch_norms
        self._functions["norms"].argtypes = self._functions["squares"].argtypes
        self._functions["norms"].restype = None
        self._unchecked = self._num_checks = 0
        self._moments_of = library.gradwatch_moments_of
        self._moments_of.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._moments_of.restype = None

    def moments_of(self, piece: Tensor) -> tuple[float, float, float, float, float]:
        """Return `moments` of a single tensor with less ado: one that `native_for` was given.

        Raises:
            UnreadableError: it has no memory of its own.
        """
        return self.moments_at(piece, *lend_one(piece))

    def moments_at(self, piece: Tensor, address: int, numel: int) -> tuple[float, float, float, float, float]:
        """Return `moments` of a tensor that was lent: its elements lie there in a row."""
        out = _Five()
        self._moments_of(_TYPES[piece.dtype], address, numel, out)
        row: tuple[float, float, float, float, float] = (out[0], out[1], out[2], out[3], out[4])
        if self._is_due("moments_of"):
            return tuple(self._checked("moments", np.array([row]), (piece,), ())[0].tolist())
        return row

    def squares(self, pieces: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return sums of squares, float64, shape (n,)."""
        return self._trusted("squares", pieces)[:, 0]

    def norms_of(self, pieces: Sequence[Tensor], lent: Lent) -> tuple[NDArray[np.float64], float]:
        """Return L2 norms of tensors of one dtype that `lend_at_once` has lent, and the norm of them all."""
        # A small model's whole step is little more than this: numpy's own way to an address takes as long as a tensor.
        count = len(pieces)
        out = array("d", bytes(8 * count + 8))
        addresses, numels = lent[0].buffer_info()[0], lent[1].buffer_info()[0]
        self._functions["norms"](_TYPES[pieces[0].dtype], count, addresses, numels, out.buffer_info()[0])
        norms = np.frombuffer(out, np.float64, count)
        self._unchecked -= 1
        if self._unchecked <= 0:
            return self._looked_at(pieces, norms, out[count])
        return norms, out[count]

    def _looked_at(
        self, pieces: Sequence[Tensor], norms: NDArray[np.float64], whole: float
    ) -> tuple[NDArray[np.float64], float]:
        self._num_checks += 1
        self._unchecked = min(1 << (self._num_checks - 1), _RARELY)
        self._calls["norms"] = self._num_checks  # another tensor's turn
        with np.errstate(all="ignore"):
            squares = self._checked("squares", np.square(norms)[:, None], pieces, (), said="norms")[:, 0]
            total = float(squares.sum())
            if not self.fault and math.isfinite(total) and abs(whole**2 - total) > 1e-9 * total:
                self._blame("norms")
            return (np.sqrt(squares), math.sqrt(total)) if self.fault else (norms, whole)

    def moments(self, pieces: Sequence[Tensor], lent: Lent | None = None) -> NDArray[np.float64]:
        """Return sum, sum of squares, zeros, non-finite and absmax without nan, float64, shape (n, 5)."""
        return self._trusted("moments", pieces, (), lent)

    def histograms(self, pieces: Sequence[Tensor]) -> NDArray[np.int64]:
        """Return signed exponent histograms, int64, shape (n, 512)."""
        return self._trusted("histograms", pieces).astype(np.int64, copy=False)

    def everything(
        self, pieces: Sequence[Tensor], lent: Lent | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return moments (n, 5) and histograms (n, 512) from one read; lent: what `lend_at_once` gives for them."""
        moments, counts = np.empty((len(pieces), 5)), np.empty((len(pieces), 512), np.int64)
        for first in range(0, len(pieces), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            of_some = None if lent is None else (lent[0][some], lent[1][some])
            rows = self._trusted("everything", pieces[some], (), of_some)
            moments[some], counts[some] = rows[:, :5], rows[:, 5:]
        return moments, counts

    def moved(self, before: Sequence[Tensor], after: Sequence[Tensor], lent: Lent | None = None) -> NDArray[np.float64]:
        """Return sums of squares of (before - after) and of before, float64, shape (n, 2).

        Args:
            before, after: the tensors.
            lent: what `lend_at_once` gives for both, one after the other.

        Raises:
            ValueError: a tensor has not as many elements as what it became.
        """
        return self._trusted("moved", before, after, lent)

    def run(
        self, name: str, pieces: Sequence[Tensor], more: Sequence[Tensor] = (), lent: Lent | None = None
    ) -> NDArray[Any]:
        """Return what a kernel writes, one row for each tensor, as it is.

        Args:
            name: of the kernel.
            pieces, more: the tensors that it reads.
            lent: what `lend_at_once` gives for all of these now, where somebody has asked.
        """
        count = len(pieces)
        if not count:
            return np.zeros((0, _KERNELS[name]))
        dtype = _readable_type(pieces[0])
        loan = lend((*pieces, *more), dtype=dtype, device=_CPU) if lent is None else Loan((*pieces, *more), lent)
        if more and not np.array_equal(loan.numels[:count], loan.numels[count:]):
            raise ValueError("what a tensor became has not as many elements")
        out = np.zeros(count * _KERNELS[name], np.int64 if name == "histograms" else np.float64)
        kernel = self._functions[name]
        kernel(_TYPES[pieces[0].dtype], count, loan.addresses.ctypes.data, loan.numels.ctypes.data, out.ctypes.data)
        if name == "everything":
            sums, counts = np.split(out, [5 * count])
            return np.hstack([sums.reshape(-1, 5), counts.view(np.int64).reshape(-1, 512).astype(np.float64)])
        return out.reshape(count, -1)

    def _trusted(
        self, name: str, pieces: Sequence[Tensor], more: Sequence[Tensor] = (), lent: Lent | None = None
    ) -> NDArray[Any]:
        rows = self.run(name, pieces, more, lent)
        return self._checked(name, rows, pieces, more) if pieces and self._is_due(name) else rows

    def _is_due(self, name: str) -> bool:
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        return calls & (calls - 1) == 0 if calls < _RARELY else calls % _RARELY == 0

    def _checked(
        self, name: str, rows: NDArray[Any], pieces: Sequence[Tensor], more: Sequence[Tensor], *, said: str = ""
    ) -> NDArray[Any]:
        """Compare some of the rows with torch; return them, or all of torch's where one is wrong.

        Args:
            said: the kernel that is to blame then, where its rows are those of `name` by another way.
        """
        chosen = self._sample(pieces)
        some = _flat([pieces[k] for k in chosen])
        expected = reference(name, some, _flat([more[k] for k in chosen]) if more else ())
        if agrees(name, rows[chosen], expected, some):
            return rows
        self._blame(said or name)
        return reference(name, _flat(pieces), _flat(more))

    def _blame(self, name: str) -> None:
        self.fault = f"the compiled kernel {name!r} and torch measured different numbers: it is switched off"
        _faults.append(self.fault)

    def _sample(self, pieces: Sequence[Tensor]) -> list[int]:
        """Return positions: another one each time, and a few of those that follow, where they are small."""
        turn = sum(self._calls.values()) % len(pieces)
        chosen, room = [turn], _CHEAP
        for position in range(turn + 1, turn + min(len(pieces), _FEW)):
            room -= pieces[position % len(pieces)].numel()
            if room > 0:
                chosen.append(position % len(pieces))
        return chosen


def _flat(pieces: Sequence[Tensor]) -> list[Tensor]:
    return [piece.detach().resolve_neg().contiguous().view(-1) for piece in pieces]


def _readable_type(piece: Tensor) -> torch.dtype:
    if piece.dtype not in _TYPES:
        raise UnreadableError(f"there is no kernel for {piece.dtype}")
    return piece.dtype


def native(pieces: Sequence[Tensor], *, worth: int) -> Native | None:
    """Return the kernels where these pieces can have them.

    Args:
        pieces: of one dtype, as `Shards` gives them.
        worth: fewer elements than this in all (a tensor counts as 256 more) are left to torch, always, so that results
            do not depend on what was measured before, and a small model never starts a compiler.
    """
    if not pieces or pieces[0].dtype not in _TYPES:
        return None
    if sum(map(Tensor.numel, pieces)) + 256 * len(pieces) < worth:
        return None
    if not (all(map(_IS_CPU, pieces)) and can_lend_all(pieces)) or world_size() > 1:
        return None
    return _load()


def native_lent(pieces: Sequence[Tensor], *, worth: int) -> tuple[Native, Lent | None] | None:
    """Return what `native` does, with what `lend_at_once` gives for the pieces, where it does: the kernels need not ask
    them again."""
    if not pieces or pieces[0].dtype not in _TYPES:
        return None
    lent = lend_at_once(pieces, dtype=pieces[0].dtype) if pieces[0].is_cpu else None
    if lent is None:
        kernels = native(pieces, worth=worth)
    else:
        kernels = None if sum(lent[1]) + 256 * len(pieces) < worth or world_size() > 1 else _load()
    return None if kernels is None else (kernels, lent)


def native_at_hand(work: int, *, worth: int) -> Native | None:
    """Return the kernels for some work: where it is worth a compiler, as `native`; for less where they cost nothing,
    since they were compiled at another time.

    A run that goes on asking for a little work has them compiled, once for the machine, so that a small model's step
    is short too. None on ranks of a distributed run.
    """
    if are_several() and world_size() > 1:
        return None
    if work < worth:
        if _little.kernels is not None and not _little.kernels.fault:
            return _little.kernels
        _little.asked += 1
        if _little.asked not in (1, _LASTS) or not (_little.asked == _LASTS or is_compiled()):
            return None
        _little.kernels = _load()
        return _little.kernels
    return _load()


class _Little:
    """How often kernels were wanted for a little work, and those that are at hand for it."""

    asked = 0
    kernels: Native | None = None


_little = _Little()


def moments_in_passing(piece: Tensor) -> tuple[float, float, float, float, float] | None:
    """Return `moments` of a plain tensor on the host whose elements lie in a row, and compute nothing that others could
    see; None where that takes more.

    Asked inside a forward or a backward, whose products have pushed all of Python's out of the processor's caches:
    there each function that is called costs as much as the numbers of a small tensor. What is asked of other rooms
    elsewhere is written out here.
    """
    lent = lend_in_passing(piece) if piece.dtype in _TYPES else None
    if lent is None or (are_several() and world_size() > 1):
        return None
    if lent[1] > WORTH_THREADS and torch.get_num_threads() > 1:
        return None
    kernels = _load() if lent[1] + 256 >= WORTH_MOMENTS else _little.kernels
    return None if kernels is None or kernels.fault else kernels.moments_at(piece, *lent)


def native_for(piece: Tensor, *, worth: int) -> Native | None:
    """Return what `native([piece], worth=worth)` does, sooner; for less work the kernels that are at hand for it."""
    if piece.dtype not in _TYPES or not piece.is_cpu or not can_lend(piece) or (are_several() and world_size() > 1):
        return None
    if piece.numel() + 256 >= worth:
        return _load()
    kernels = _little.kernels
    return None if kernels is None or kernels.fault else kernels


def _load() -> Native | None:
    """Return the kernels, or None where they can't be had or are not believed any more. Never raises."""
    kernels = _attempt().kernels
    return None if kernels is None or kernels.fault else kernels


def native_state() -> str:
    """Return "native", or why torch measures CPU tensors instead; compiles what was not compiled yet."""
    found = _attempt()
    if found.kernels is not None and found.kernels.fault:
        return f"torch ({found.kernels.fault})"
    return "native" if found.kernels is not None else f"torch ({found.reason})"


def native_fault() -> str:
    """Return what a kernel was seen to get wrong in this process, or nothing; compiles nothing."""
    return _faults[0] if _faults else ""


class _Attempt(NamedTuple):
    kernels: Native | None
    reason: str = ""


@cache
def _attempt() -> _Attempt:
    if os.environ.get("GRADWATCH_NATIVE", "1") == "0":
        return _Attempt(None, "GRADWATCH_NATIVE=0")
    reason = ""
    try:
        for skip in (0, 1):
            try:
                kernels = Native(library(skip=skip))
            except (OSError, AttributeError) as error:  # AttributeError: a library without our functions
                reason = f"the compiled library can't be loaded: {error}"
                continue
            if _is_right(kernels):
                return _Attempt(kernels)
            reason = "the compiled kernels compute wrong numbers"
    except Exception as error:  # an accelerator that can't be had is no one's trouble
        reason = str(error) if isinstance(error, NoLibraryError) else f"{type(error).__name__}: {error}"
    return _Attempt(None, " ".join(reason.split())[:300])


def _is_right(kernels: Native) -> bool:
    """Compare with torch once, where it is hard: a compiler that reorders beyond IEEE is worse than none."""
    odd = np.array([0.0, -0.0, 1.5, -2.0, np.inf, np.nan, 1e-30, -1e-42, 1e38] * 11, np.float64)
    plain = np.sin(np.arange(10_007.0)) * np.exp(np.cos(np.arange(10_007.0) * 7) * 30)
    rows = [odd, odd[np.isfinite(odd)], plain, plain[:4096], plain[:17], plain[:1], plain[:0]]
    for dtype in _TYPES:
        pieces = [torch.from_numpy(row).to(dtype) for row in rows]
        after = [piece * 0.75 for piece in pieces]
        for name in _KERNELS:
            found = kernels.run(name, pieces, after if name == "moved" else ())
            if not agrees(name, found, reference(name, pieces, after), pieces):
                return False
        if not _has_right_norms(kernels, pieces):
            return False
        if kernels.moments_of(pieces[2]) != tuple(kernels.run("moments", pieces[2:3])[0].tolist()):
            return False
    return True


def _has_right_norms(kernels: Native, pieces: Sequence[Tensor]) -> bool:
    full = [piece for piece in pieces if piece.numel()]
    lent = lend_at_once(full, dtype=full[0].dtype)
    if lent is None:
        return False
    for chosen in (slice(None), slice(1, None)):  # with elements that are not finite, and without
        norms, whole = kernels.norms_of(full[chosen], (lent[0][chosen], lent[1][chosen]))
        squares = reference("squares", full[chosen], ())[:, 0]
        if not np.allclose([*norms, whole], np.sqrt([*squares, squares.sum()]), rtol=1e-9, atol=0, equal_nan=True):
            return False
    return True
