"""Views: how an alias shows a tensor, and how what a hook returns is written back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Heads", "PositionsFirst", "Strided", "View"]


class View(Protocol):
    """Shows a tensor in another form. Linear, so that gradients can be shown in the same form."""

    def read(self, tensor: Tensor) -> Tensor: ...

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Return `tensor` with what `read` shows replaced by `value`; `tensor` itself is not changed."""
        ...


@dataclass(frozen=True)
class Heads:
    """Attention heads apart: (..., parts * heads * d) read as (..., heads, d).

    Attributes:
        heads: number of heads in the part.
        part: which part of a packed projection: 1 for the keys of a fused q, k, v.
        parts: how many equal parts are packed.
    """

    heads: int
    part: int = 0
    parts: int = 1

    def read(self, tensor: Tensor) -> Tensor:
        part = tensor if self.parts == 1 else tensor.chunk(self.parts, dim=-1)[self.part]
        return part.unflatten(-1, (self.heads, part.shape[-1] // self.heads))

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        flat = value.flatten(-2)
        if self.parts == 1:
            return flat
        pieces = list(tensor.chunk(self.parts, dim=-1))
        pieces[self.part] = flat
        return torch.cat(pieces, dim=-1)


@dataclass(frozen=True)
class Strided:
    """One part of a packed projection, wherever it stands: heads of `width`, the first at `offset`, each `step` on.

    Attributes:
        heads: how many; None for one part that has no heads.
        width: of each.
        offset: where the first begins.
        step: from one to the next.
    """

    heads: int | None
    width: int
    offset: int
    step: int

    def read(self, tensor: Tensor) -> Tensor:
        if self.heads is None:
            return tensor[..., self.offset : self.offset + self.width]
        inner = self.offset % self.step
        begin = self.offset - inner
        apart = tensor[..., begin : begin + self.heads * self.step].unflatten(-1, (self.heads, self.step))
        return apart[..., inner : inner + self.width]

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        new = tensor.clone()
        self.read(new).copy_(value)
        return new


@dataclass(frozen=True)
class PositionsFirst:
    """What a model holds as (positions, batch, ...), shown with the batch first."""

    inner: View | None = None

    def read(self, tensor: Tensor) -> Tensor:
        return (tensor if self.inner is None else self.inner.read(tensor)).transpose(0, 1)

    def write(self, tensor: Tensor, value: Tensor) -> Tensor:
        swapped = value.transpose(0, 1)
        return swapped if self.inner is None else self.inner.write(tensor, swapped)
