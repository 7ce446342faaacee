"""One-pass kernels for the CPU, compiled once per machine by the C compiler that is there, if one is.

Torch makes a pass over memory for each statistic and has no fast histogram. The few loops of `_native.c` read a tensor
once, at the speed of memory: a histogram of exponents takes a quarter of `bincount`'s time. Without a compiler, with
`GRADWATCH_NATIVE=0`, and in distributed runs (whose ranks must agree to the last bit) torch does all of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Native", "is_readable", "native", "native_for"]

_SOURCE = Path(__file__).with_name("_native.c")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_Five = ctypes.c_double * 5
_FLAGS = (["-O3", "-march=native"], ["-O3"])


class Native:
    """The compiled kernels. All take contiguous CPU tensors of one dtype: float32, bfloat16 or float64."""

    def __init__(self, library: Any) -> None:
        for name in ("squares", "moments", "everything", "histograms", "moved"):
            function = getattr(library, f"gradwatch_{name}")
            function.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
            function.restype = None
            setattr(self, f"_{name}", function)
        self._moments_of = library.gradwatch_moments_of
        self._moments_of.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._moments_of.restype = None

    def moments_of(self, piece: Tensor) -> tuple[float, float, float, float, float]:
        """Return `moments` of a single tensor, of any shape, with less ado."""
        out = _Five()
        self._moments_of(_TYPES[piece.dtype], piece.data_ptr(), piece.numel(), out)
        return out[0], out[1], out[2], out[3], out[4]

    def squares(self, pieces: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return sums of squares, float64, shape (n,)."""
        return self._call("_squares", pieces, np.zeros(len(pieces)))

    def moments(self, pieces: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return sum, sum of squares, zeros, non-finite and absmax without nan, float64, shape (n, 5)."""
        return self._call("_moments", pieces, np.zeros((len(pieces), 5)))

    def histograms(self, pieces: Sequence[Tensor]) -> NDArray[np.int64]:
        """Return signed exponent histograms, int64, shape (n, 512)."""
        return self._call("_histograms", pieces, np.zeros((len(pieces), 512), np.int64))

    def everything(self, pieces: Sequence[Tensor]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return moments (n, 5) and histograms (n, 512) from one read."""
        out = self._call("_everything", pieces, np.zeros(len(pieces) * (5 + 512)))
        moments, counts = np.split(out, [5 * len(pieces)])
        return moments.reshape(-1, 5), counts.view(np.int64).reshape(-1, 512)

    def moved(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> NDArray[np.float64]:
        """Return sums of squares of (before - after) and of before, float64, shape (n, 2)."""
        return self._call("_moved", before, np.zeros((len(before), 2)), after)

    def _call(
        self, name: str, pieces: Sequence[Tensor], out: NDArray[Any], more: Sequence[Tensor] = ()
    ) -> NDArray[Any]:
        if pieces:
            tensors = np.fromiter(map(Tensor.data_ptr, (*pieces, *more)), np.uintp, len(pieces) + len(more))
            numels = np.fromiter(map(Tensor.numel, pieces), np.int64, len(pieces))
            kernel = getattr(self, name)
            kernel(_TYPES[pieces[0].dtype], len(pieces), tensors.ctypes.data, numels.ctypes.data, out.ctypes.data)
        return out


def native(pieces: Sequence[Tensor], *, worth: int) -> Native | None:
    """Return the kernels where these pieces can have them.

    Args:
        pieces: contiguous, on the CPU, of one dtype.
        worth: fewer elements than this in all (a tensor counts as 256 more) are left to torch, always, so that results
            do not depend on what was measured before, and a small model never starts a compiler.
    """
    if not pieces or pieces[0].dtype not in _TYPES:
        return None
    if sum(map(Tensor.numel, pieces)) + 256 * len(pieces) < worth:
        return None
    if not _PLAIN.issuperset(map(type, pieces)) or any(map(Tensor.is_neg, pieces)) or _has_peers():
        return None
    return _load()


def native_for(piece: Tensor, *, worth: int) -> Native | None:
    """Return what `native([piece], worth=worth)` does, sooner."""
    if piece.numel() + 256 < worth or piece.dtype not in _TYPES or type(piece) not in _PLAIN or piece.is_neg():
        return None
    return None if _has_peers() else _load()


def is_readable(tensor: Tensor) -> bool:
    """Return whether the kernels could read this tensor as it lies in memory."""
    return tensor.is_cpu and tensor.dtype in _TYPES and type(tensor) in _PLAIN and tensor.is_contiguous()


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@cache
def _load() -> Native | None:
    if os.environ.get("GRADWATCH_NATIVE", "1") == "0":
        return None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None
    for flags in _FLAGS:
        try:
            kernels = Native(ctypes.CDLL(str(_built(compiler, flags))))
        except (OSError, subprocess.SubprocessError):
            continue
        if _is_right(kernels):
            return kernels
    return None


def _built(compiler: str, flags: list[str]) -> Path:
    """Return the compiled library, from the cache if it is there."""
    described = "\0".join([compiler, *flags, platform.machine(), _processor(), _SOURCE.read_text()])
    name = f"native-{hashlib.sha256(described.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    target = folder / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / name
            command = [compiler, *flags, "-shared", "-fPIC", str(_SOURCE), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            built.replace(target)  # in one go: another process may be at it too
    return target


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "gradwatch"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="gradwatch-"))


def _processor() -> str:
    """Return what tells machines apart that share a home folder but not an instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _is_right(kernels: Native) -> bool:
    """Compare with numpy once: a compiler that reorders beyond IEEE is worse than none."""
    values = np.array([0.0, -0.0, 1.5, -2.0, np.inf, np.nan, 1e-30] * 11, np.float32)
    pieces = [torch.from_numpy(values), torch.from_numpy(values[:70][np.isfinite(values[:70])])]
    expected = [np.nan, np.nan, 22.0, 22.0, np.inf], [-5.0, 62.5, 20.0, 0.0, 2.0]
    if not np.allclose(kernels.moments(pieces), expected, equal_nan=True):
        return False
    if not np.allclose(kernels.squares(pieces), [np.nan, 62.5], equal_nan=True):
        return False
    counts = kernels.histograms(pieces)[0]
    return [int(counts[k]) for k in (0, 256, 127, 384, 255, 27)] == [11, 11, 11, 11, 22, 11]
