"""Attention's two products written as `torch.einsum`: what stands where, read from the equation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._attention_forms import Form

__all__ = ["Contraction", "Orders", "contraction", "operands", "turned"]


Orders = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Contraction:
    """One product of two tensors with letters for dimensions, over one of them.

    Attributes:
        left, right, out: the letters of each.
        over: the letter that is summed over.
    """

    left: str
    right: str
    out: str
    over: str

    @property
    def of_scores(self) -> Orders | None:
        """Return in which order queries and keys have (batch, heads, positions, width); None: these are no scores."""
        shared, rows, columns = self.out[:-2], self.out[-2], self.out[-1]
        if set(self.left) != {*shared, rows, self.over} or set(self.right) != {*shared, columns, self.over}:
            return None
        return _order(self.left, shared + rows + self.over), _order(self.right, shared + columns + self.over)

    @property
    def of_values(self) -> Orders | None:
        """Return the same of values, and of what a pattern on the left mixes them into; None: there is none."""
        shared, rows = self.left[:-2], self.left[-2]
        width = next(c for c in self.right if c not in self.left)
        if self.left[-1] != self.over or set(self.out) != {*shared, rows, width}:
            return None
        if set(self.right) != {*shared, self.over, width}:
            return None
        return _order(self.right, shared + self.over + width), _order(self.out, shared + rows + width)


def _order(letters: str, wanted: str) -> tuple[int, ...]:
    return tuple(letters.index(letter) for letter in wanted)


def contraction(func: Any, args: tuple[Any, ...]) -> Contraction | None:
    """Return what a call of `torch.einsum` multiplies, where it may be one of attention's products."""
    if getattr(func, "__name__", "") != "einsum" or len(args) < 2 or not isinstance(args[0], str):
        return None
    found = re.fullmatch(r"(\w+),(\w+)->(\w+)", args[0].replace(" ", ""))
    left, right, out = found.groups() if found is not None else ("", "", "")
    over = (set(left) & set(right)) - set(out)
    shared = set(left) & set(right) & set(out)
    each = len(shared) + 2
    if len(over) != 1 or len(shared) not in (1, 2) or {len(p) for p in (left, right, out)} != {each}:
        return None
    if any(len(set(part)) != each for part in (left, right, out)):
        return None
    return Contraction(left, right, out, over.pop())


def turned(order: tuple[int, ...], form: Form) -> Form:
    """Return the form of what stands in another order of dimensions than a form takes."""
    back = [order.index(i) for i in range(len(order))]
    return Form(
        lambda t: form.show(t.permute(order)),
        lambda value, was: form.back(value, was.permute(order)).permute(back),
    )


def operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Return the two tensors of a call, given one by one or as a list."""
    given = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    return (given[0], given[1]) if len(given) == 2 and all(isinstance(t, Tensor) for t in given) else None
