"""Sums from which mean, spread, magnitude and sparsity of a tensor follow, and which merge by addition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnreadableError
from ..torchside import is_host, parts, values, wide_dtype
from ._counting import num_nonzero
from ._device import scanned
from ._native import WORTH_MOMENTS, WORTH_THREADS, native_for
from ._norms import local_norms

__all__ = ["MOMENTS", "extent", "host_extent", "host_moments", "moments", "num_nonfinite"]

_CHUNK = 1 << 18
_HUGE = 3e38

MOMENTS = ("sum", "sumsq", "zeros", "nonfinite", "absmax")
"""What `moments` returns, in order; all but the last merge by addition, the last by maximum."""


@torch.no_grad()
def moments(tensor: Tensor) -> Tensor:
    """Return sum, sum of squares, zeros, non-finite elements and largest magnitude of a tensor.

    Args:
        tensor: of any kind, dtype and device (see `torchside.values`; a complex one counts real and imaginary parts);
            read by nobody on other devices than the CPU.

    Returns:
        float64, shape (5,), in the order of `MOMENTS`. The two sums are nan or inf where an element is; the largest
        magnitude leaves nan out. All 0 for an empty tensor.

    Raises:
        UnreadableError: nothing here can read a tensor of this kind.
    """
    if is_host(tensor.device):
        return torch.tensor(host_moments(tensor), dtype=torch.float64)
    piece, zeros = values(tensor)
    pieces, times = parts(piece)
    found = torch.stack([_device_moments(p) for p in pieces])
    sums = found[:, :4].sum(dim=0) * times
    sums[2] += zeros
    return torch.cat([sums, found[:, 4:].amax(dim=0)])


@torch.no_grad()
def extent(tensor: Tensor) -> Tensor:
    """Return sum of squares, non-finite elements and largest magnitude of a tensor; float64, shape (3,).

    Args:
        tensor: as for `moments`.
    """
    if is_host(tensor.device):
        return torch.tensor(host_extent(tensor), dtype=torch.float64)
    pieces, times = parts(values(tensor).piece)
    found = torch.stack([_device_extent(p) for p in pieces])
    return torch.cat([found[:, :2].sum(dim=0) * times, found[:, 2:].amax(dim=0)])


def host_moments(tensor: Tensor) -> tuple[float, float, float, float, float]:
    """Return `moments` of a CPU tensor as plain numbers, where reading is free."""
    # No operation of torch's: nothing to keep out of a graph, which costs as much as to measure a small tensor.
    return _lent_moments(tensor) or _moments_elsewhere(tensor)


@torch.no_grad()
def _moments_elsewhere(tensor: Tensor) -> tuple[float, float, float, float, float]:
    piece, zeros = values(tensor)
    pieces, times = parts(piece)
    total = sumsq = nonfinite = most = 0.0
    for dense in pieces:
        found = _lent_moments(dense) or _torch_moments(dense)
        total, sumsq, zeros = total + found[0] * times, sumsq + found[1] * times, zeros + int(found[2]) * times
        nonfinite, most = nonfinite + found[3] * times, max(most, found[4])
    return total, sumsq, float(zeros), nonfinite, most


def host_extent(tensor: Tensor) -> tuple[float, float, float]:
    """Return `extent` of a CPU tensor as plain numbers."""
    if found := _lent_moments(tensor):
        return found[1], found[3], found[4]
    return _extent_elsewhere(tensor)


@torch.no_grad()
def _extent_elsewhere(tensor: Tensor) -> tuple[float, float, float]:
    pieces, times = parts(values(tensor).piece)
    sumsq = nonfinite = most = 0.0
    for dense in pieces:
        lent = _lent_moments(dense)
        found3 = (lent[1], lent[3], lent[4]) if lent else _torch_extent(dense)
        sumsq, nonfinite, most = sumsq + found3[0] * times, nonfinite + found3[1] * times, max(most, found3[2])
    return sumsq, nonfinite, most


def num_nonfinite(tensor: Tensor) -> Tensor | float:
    """Return how many elements are inf or nan: a number for a CPU tensor, else a 0-dim tensor, unread."""
    if is_host(tensor.device) and (found := _lent_moments(tensor)):
        return found[3]
    return _nonfinite_elsewhere(tensor)


@torch.no_grad()
def _nonfinite_elsewhere(tensor: Tensor) -> Tensor | float:
    pieces, times = parts(values(tensor).piece)
    if not is_host(tensor.device):
        return torch.stack([(~torch.isfinite(piece)).sum() for piece in pieces]).sum() * times
    return float(sum(map(_host_nonfinite, pieces)) * times)


def _lent_moments(tensor: Tensor) -> tuple[float, float, float, float, float] | None:
    """Return moments from the compiled kernel, or None where this tensor can't have it."""
    numel = tensor.numel()
    # Large tensors are read faster by several threads of torch, if there are.
    if numel > WORTH_THREADS and torch.get_num_threads() > 1:
        return None
    kernels = native_for(tensor, worth=WORTH_MOMENTS)
    try:
        return kernels.moments_of(tensor) if kernels is not None else None
    except UnreadableError:  # a stand-in without memory: what stands behind it is looked for
        return None


def _torch_moments(piece: Tensor) -> tuple[float, float, float, float, float]:
    numel = piece.numel()
    if not numel:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    total = piece.sum(dtype=torch.promote_types(piece.dtype, torch.float32)).item()
    sumsq, nonfinite, absmax = _torch_extent(piece)
    if not nonfinite and not -_HUGE < total < _HUGE:
        # Each element fits into float32, their sum perhaps not.
        total = sum(chunk.sum(dtype=torch.float64).item() for chunk in piece.view(-1).split(_CHUNK))
    zeros = numel - num_nonzero(piece)
    if nonfinite:
        zeros -= int(torch.isnan(piece).sum())
    return total, sumsq, float(zeros), nonfinite, absmax


def _torch_extent(piece: Tensor) -> tuple[float, float, float]:
    if not piece.numel():
        return 0.0, 0.0, 0.0
    norm = local_norms([piece]).item()
    low, high = torch.aminmax(piece)
    nonfinite, absmax = 0, max(high.item(), -low.item())
    # A finite norm proves that every element is finite.
    if not norm < float("inf"):
        nonfinite = piece.numel() - int(torch.isfinite(piece).sum())
        absmax = piece.abs().nan_to_num_(nan=0.0, posinf=torch.inf).max().item()
    return norm * norm, float(nonfinite), absmax


def _host_nonfinite(piece: Tensor) -> int:
    if lent := _lent_moments(piece):
        return int(lent[3])
    if float(local_norms([piece])) < float("inf"):
        return 0
    return piece.numel() - int(torch.isfinite(piece).sum())


def _device_moments(piece: Tensor) -> Tensor:
    if found := scanned([piece], histograms=False):
        return found[0][0]
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros(len(MOMENTS), dtype=wide, device=piece.device)
    rest = _device_extent(piece)
    total, zeros = piece.sum(dtype=wide), (piece == 0).sum().to(wide)
    return torch.cat([total[None], rest[:1], zeros[None], rest[1:]])


def _device_extent(piece: Tensor) -> Tensor:
    if found := scanned([piece], histograms=False):
        row = found[0][0]
        return torch.stack([row[1], row[3], row[4]])
    wide = wide_dtype(piece.device)
    if not piece.numel():
        return torch.zeros(3, dtype=wide, device=piece.device)
    magnitudes = piece.abs()
    rest = [
        torch.linalg.vector_norm(piece, dtype=torch.promote_types(piece.dtype, wide)).square(),
        (~torch.isfinite(piece)).sum(),
        torch.where(torch.isnan(magnitudes), 0.0, magnitudes).amax(),
    ]
    return torch.stack([value.to(wide) for value in rest])
