"""Whether the one-read kernels for CUDA can be had, and what to do where they can't."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..torchside import can_lend
from ._native import native_fault, native_state
from ._packed import forget_places

__all__ = ["forget_layouts", "kernel_backends", "kernel_faults", "scanned", "scans"]

_failure: list[str] = []


def scanned(pieces: Sequence[Tensor], *, histograms: bool) -> tuple[Tensor, Tensor | None] | None:
    """Return moments (n, 5) and histograms (n, 512) of CUDA tensors from one read, or None where torch has to do it.

    Args:
        pieces: contiguous, of one dtype, on one device.
        histograms: count exponents too.
    """
    if not pieces or pieces[0].device.type != "cuda" or _failure:
        return None
    device = pieces[0].device
    if any(piece.device != device or not can_lend(piece) for piece in pieces):
        return None
    scan = _scan()
    if scan is None:
        return None
    try:
        return scan(pieces, histograms=histograms)
    except Exception as error:  # a device or a Triton that can't compile them: torch's own kernels are always there
        _failure.append(f"{type(error).__name__}: {error}")
        return None


def scans(device: torch.device) -> bool:
    """Return whether tensors there are read once, by kernels of our own."""
    return device.type == "cuda" and not _failure and _scan() is not None


@cache
def _scan() -> Callable[..., Any] | None:
    try:
        from ._triton import scan
    except Exception:  # Triton's import fails in many ways where there is no driver
        return None
    return scan


def forget_layouts() -> None:
    """Let go of what the kernels keep on devices from step to step; they make it again where it is wanted."""
    forget_places()
    kernels = sys.modules.get(f"{__package__}._triton")
    if kernels is not None:
        kernels._layout.cache_clear()


def kernel_backends() -> dict[str, str]:
    """Return what measures CPU and CUDA tensors here, by device type: for reports of the installation."""
    cuda = "not available"
    if torch.cuda.is_available():
        cuda = f"torch ({_failure[0]})" if _failure else "triton" if _scan() is not None else "torch"
    return {"cpu": native_state(), "cuda": cuda}


def kernel_faults() -> list[str]:
    """Return which kernels were switched off in this process because they failed or were wrong; none is tried."""
    faults = [native_fault()] if native_fault() else []
    return faults + [f"the CUDA kernels failed, torch measures instead: {failure}" for failure in _failure]
