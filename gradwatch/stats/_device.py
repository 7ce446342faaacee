"""Whether the one-read kernels for CUDA can be had, and what to do where they can't."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._native import _load

__all__ = ["kernel_backends", "scanned"]

_failure: list[str] = []


def scanned(pieces: Sequence[Tensor], *, histograms: bool) -> tuple[Tensor, Tensor | None] | None:
    """Return moments (n, 5) and histograms (n, 512) of CUDA tensors from one read, or None where torch has to do it.

    Args:
        pieces: contiguous, of one dtype, on one device.
        histograms: count exponents too.
    """
    if not pieces or pieces[0].device.type != "cuda" or _failure:
        return None
    if any(type(piece) not in (Tensor, torch.nn.Parameter) or piece.is_neg() for piece in pieces):
        return None
    scan = _scan()
    if scan is None:
        return None
    try:
        return scan(pieces, histograms=histograms)
    except Exception as error:  # a device or a Triton that can't compile them: torch's own kernels are always there
        _failure.append(f"{type(error).__name__}: {error}")
        return None


@cache
def _scan() -> Callable[..., Any] | None:
    try:
        from ._triton import scan
    except Exception:  # Triton's import fails in many ways where there is no driver
        return None
    return scan


def kernel_backends() -> dict[str, str]:
    """Return what measures CPU and CUDA tensors here, by device type: for reports of the installation."""
    cuda = "not available"
    if torch.cuda.is_available():
        cuda = f"torch ({_failure[0]})" if _failure else "triton" if _scan() is not None else "torch"
    return {"cpu": "native" if _load() is not None else "torch", "cuda": cuda}
