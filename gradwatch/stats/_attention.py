"""Largest score and entropy of each head of an attention, from blocks of its scores: all of them are never held."""

# B batch, H heads, K heads of keys, T queries, S keys, D width

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..torchside import Attended, home, is_host, wide_dtype

__all__ = ["apart", "attention_bound", "attention_peaks", "attention_sums"]

_HOST_BLOCK, _DEVICE_BLOCK = 2**19, 2**23
"""Elements of a block of scores: on the host what stays in a cache."""
_MASKED = 0.25
"""Share of a format's lowest number below which a score is taken for a masked one."""


def attention_peaks(attended: Attended) -> Tensor:
    """Return the largest score of each head, float32 (float64 of float64), shape (H,): over all places that are not
    masked; -inf where there is none, nan where a score is nan."""
    peaks: Tensor | None = None
    for scores in _blocks(attended):
        found = scores.amax(dim=(0, 2, 3))
        peaks = found if peaks is None else torch.maximum(peaks, found)
    return _nothing(attended) if peaks is None else peaks


def attention_bound(attended: Attended) -> Tensor | None:
    """Return a number for each head that no score of it exceeds, shape (H,), for the price of reading queries and keys:
    the longest query times the longest key. None where a mask may add something, or scores alone are known."""
    if attended.scores is not None or (attended.mask is not None and attended.mask.dtype != torch.bool):
        return None
    q_BHTD, k_BKSD = apart(attended)
    if not (q_BHTD.numel() and k_BKSD.numel()):
        return None
    q, k = (_wide(t).square().sum(-1).amax(dim=(0, 2)).sqrt() for t in (q_BHTD, k_BKSD))
    return q * k.repeat_interleave(len(q) // len(k)) * abs(_scale(attended))


def attention_sums(attended: Attended) -> tuple[Tensor, Tensor]:
    """Return what adds up over calls and ranks, and the largest score, of each head.

    The entropy is that of the pattern of a query, in nats; its bound the logarithm of the number of places that the
    query may look at. Their ratio is 1 where a head looks everywhere alike, and 0 where each query looks at one place
    (Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", ICML 2023, arXiv
    2303.06296).

    Returns:
        Sums over queries of entropy and of its bound, shape (H, 2); the largest scores, shape (H,). Wide.
    """
    sums: Tensor | None = None
    peaks: Tensor | None = None
    for scores in _blocks(attended):
        top = scores.amax(dim=-1, keepdim=True)
        sees = scores > -math.inf
        count = sees.sum(dim=-1)
        # A query that may look at nothing has no pattern: its row is 0 throughout.
        below = torch.where(sees, scores - top.masked_fill(count[..., None] == 0, 0.0), 0.0)
        weight = torch.where(sees, below.exp(), 0.0)
        total = weight.sum(dim=-1)
        entropy = total.clamp(min=1.0).log() - (weight * below).sum(dim=-1) / total.clamp(min=1.0)
        # What is not a number must not read as a head that looks everywhere alike.
        entropy = torch.where(scores.isnan().any(dim=-1), torch.nan, entropy)
        found = torch.stack([entropy, count.clamp(min=1).to(entropy.dtype).log()], dim=-1)
        wide = found.to(wide_dtype(found.device)).sum(dim=(0, 2))
        highest = top.amax(dim=(0, 2, 3)).to(wide.dtype)
        sums = wide if sums is None else sums + wide
        peaks = highest if peaks is None else torch.maximum(peaks, highest)
    if sums is None or peaks is None:
        nothing = _nothing(attended)
        return nothing.new_zeros(len(nothing), 2), nothing
    return sums, peaks


def apart(attended: Attended) -> tuple[Tensor, Tensor]:
    """Return queries (B, H, T, D) and keys (B, K, S, D), as views where it can be."""
    return _apart(attended.q.detach(), attended.heads), _apart(attended.k.detach(), attended.heads)


def _apart(tensor: Tensor, heads: int | None) -> Tensor:
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    if tensor.dim() == 3 and heads and tensor.shape[0] % heads == 0:
        return tensor.unflatten(0, (-1, heads))
    return tensor[:, None] if tensor.dim() == 3 else tensor[None, None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scale(attended: Attended) -> float:
    return 1 / math.sqrt(attended.q.shape[-1]) if attended.scale is None else float(attended.scale)


def _nothing(attended: Attended) -> Tensor:
    heads = apart(attended)[0].shape[1]
    device = home([attended.q])
    return torch.full((heads,), -math.inf, dtype=wide_dtype(device), device=device)


def _blocks(attended: Attended) -> Iterator[Tensor]:
    """Yield the scores in blocks (b, H, t, S), wide, -inf where a query may not look."""
    if attended.scores is not None:
        whole = _apart(attended.scores.detach(), attended.heads)
        for batch, rows in _cuts(whole.shape, whole.device):
            yield _unseen(_wide(whole[batch, :, rows]), torch.finfo(whole.dtype).min)
        return
    q, k = apart(attended)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    mask = None if attended.mask is None else attended.mask.detach().expand(shape)
    for batch, rows in _cuts(shape, q.device):
        yield _scores(attended, q[batch, :, rows], k[batch], mask, batch, rows)


def _scores(
    attended: Attended, q_BHTD: Tensor, k_BKSD: Tensor, mask: Tensor | None, batch: slice, rows: slice
) -> Tensor:
    # By groups: keys are not repeated for each head that shares them.
    q, k = _wide(q_BHTD).unflatten(1, (k_BKSD.shape[1], -1)), _wide(k_BKSD)
    scores = torch.matmul(q, k[:, :, None].mT).flatten(1, 2) * _scale(attended)
    if attended.is_causal:
        places = torch.arange(k.shape[-2], device=q.device)
        own = torch.arange(rows.start, rows.start + q.shape[-2], device=q.device)
        scores = scores.masked_fill(places > own[:, None], -math.inf)
    if mask is None:
        return scores
    part = mask[batch, :, rows]
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, -math.inf)
    return _unseen(scores + part, torch.finfo(part.dtype).min)


def _unseen(scores: Tensor, lowest: float) -> Tensor:
    """Return scores with -inf where a mask has added the lowest number that there is, or the like of it."""
    return scores.masked_fill(scores < _MASKED * lowest, -math.inf)


def _cuts(shape: tuple[int, ...] | torch.Size, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield batch and queries of each block."""
    num, heads, queries, keys = shape
    if not num * heads * queries * keys:
        return
    limit = _HOST_BLOCK if is_host(device) else _DEVICE_BLOCK
    rows = min(queries, max(1, limit // (heads * keys)))
    samples = max(1, limit // (heads * keys * queries)) if rows == queries else 1
    for first in range(0, num, samples):
        for row in range(0, queries, rows):
            yield slice(first, first + samples), slice(row, row + rows)
