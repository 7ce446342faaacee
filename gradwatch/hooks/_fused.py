"""What `scaled_dot_product_attention` computes, in steps; and the largest scores without keeping them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..torchside import attended_fused

__all__ = ["Fused"]


@dataclass
class Fused:
    """One call of torch's fused attention, before it is made."""

    func: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    grouped: bool = False

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Fused:
        found, given = attended_fused(args, kwargs)
        return cls(
            func,
            found.q,
            found.k,
            given["value"],
            found.mask,
            given.get("dropout_p", 0.0),
            found.is_causal,
            found.scale,
            given.get("enable_gqa", False),
        )

    def run(self) -> Tensor:
        """Return what the fused function gives."""
        more: dict[str, Any] = {"enable_gqa": True} if self.grouped else {}
        out: Tensor = self.func(
            self.q,
            self.k,
            self.v,
            attn_mask=self.mask,
            dropout_p=self.dropout,
            is_causal=self.is_causal,
            scale=self.scale,
            **more,
        )
        return out

    def _wide(self, tensor: Tensor) -> Tensor:
        groups = self.q.shape[-3] // tensor.shape[-3] if self.grouped else 1
        return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=-3)

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """Return what the softmax is taken of; of some queries, where wanted.

        Masked places hold the lowest number there is, not minus infinity: a hook may then multiply by zero.
        """
        q = self.q[..., rows, :]
        scale = 1 / math.sqrt(self.q.shape[-1]) if self.scale is None else self.scale
        scores = torch.matmul(q, self._wide(self.k).transpose(-1, -2)) * scale
        mask = self.mask
        if self.is_causal:
            full = torch.ones(self.q.shape[-2], self.k.shape[-2], dtype=torch.bool, device=q.device)
            mask = full.tril()
        if mask is None:
            return scores
        mask = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
        return scores.masked_fill(~mask, torch.finfo(q.dtype).min) if mask.dtype == torch.bool else scores + mask

    def pattern(self, scores: Tensor) -> Tensor:
        """Return the softmax of scores; zeros where a query may look at nothing, as the fused function has it."""
        nothing = (scores <= torch.finfo(scores.dtype).min).all(dim=-1, keepdim=True)
        # Filled before and after: the softmax of nothing is not a number, and neither is its gradient.
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = F.softmax(scores.masked_fill(nothing, 0.0), dim=-1, dtype=wide).to(scores.dtype)
        return pattern.masked_fill(nothing, 0.0)

    def mixed(self, pattern: Tensor) -> Tensor:
        """Return the values mixed by a pattern, with the call's own dropout."""
        if self.dropout:
            pattern = F.dropout(pattern, self.dropout)
        return torch.matmul(pattern, self._wide(self.v))

    def largest(self, *, rows: int = 256) -> Tensor:
        """Return the largest score of each query, (..., queries, 1); of no more than `rows` queries at a time are the
        scores ever held."""
        parts = (slice(start, start + rows) for start in range(0, self.q.shape[-2], rows))
        return torch.cat([self.scores(part).amax(dim=-1, keepdim=True) for part in parts], dim=-2)
