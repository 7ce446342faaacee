"""What each of two ranks brought to the gradients that they share: tells which one does not hold what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..torchside import Aside, StandIn, WeakHook, moved, wide_dtype

__all__ = ["BROUGHT", "HELD", "Contributions", "farther_rank"]

BROUGHT, HELD = "brought", "held"
"""Names of what travels: sums over the ranks for each parameter, and what each rank holds in the end."""
_NUM, _BLOCK = 4, 1 << 12
"""Sums of a gradient, and entries after which their signs come again."""
_FARTHER = 4.0


class Contributions:
    """Sums up gradients with fixed signs, as they are complete on this rank and again when they have been reduced.

    Such a sum is linear: over the ranks those of what they brought come to that of the gradient that all should hold,
    as near as rounding lets it. Of two ranks that hold something else, the one that is farther from it holds the fault.
    A flip of the last bits, which is smaller than the rounding of all entries together, leaves both equally far.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._brought: dict[int, Tensor] = {}
        self._signs: Tensor | None = None

    def listen(self, params: Iterable[Tensor | None]) -> None:
        """Take in the gradients of one step's backward passes; of several the last one counts."""
        self.forget()
        for p in params:
            if p is not None and not isinstance(p, StandIn) and p.requires_grad and p.is_leaf:
                self._handles.append(WeakHook.of(self._note).hang(p.register_post_accumulate_grad_hook))

    def _note(self, param: Tensor) -> None:
        try:
            with Aside():
                if param.grad is not None and param.grad.layout is torch.strided:
                    self._brought[id(param)] = self._sums(param.grad.detach())
        except Exception:  # in the midst of backward nothing may escape: then no rank is named
            self.forget()

    def _sums(self, grad: Tensor) -> Tensor:
        """Return the sums of a gradient, shape (4,), wide."""
        wide = wide_dtype(grad.device)
        if self._signs is None or self._signs.device != grad.device:
            self._signs = _signs().to(grad.device, wide)
        flat = grad.reshape(-1)
        whole = flat.numel() // _BLOCK * _BLOCK
        found = flat[whole:].to(wide) @ self._signs[: flat.numel() - whole]
        return found + flat[:whole].view(-1, _BLOCK).sum(0, dtype=wide) @ self._signs if whole else found

    def take(self, params: Sequence[Tensor | None], grads: Mapping[int, Tensor], device: torch.device) -> Any:
        """Return what this rank brought to each parameter, with a 1 behind it, and what it holds of it now; shapes
        (n, 5), (n, 4). Listens no more."""
        brought, wide = self._brought, wide_dtype(device)
        self.forget()
        nothing = torch.zeros(_NUM, dtype=wide, device=device)
        one = torch.ones(1, dtype=wide, device=device)
        gave, holds = [], []
        for p in params:
            sums, grad = brought.get(id(p)), grads.get(id(p))
            if sums is None or grad is None or grad.layout is not torch.strided:
                gave.append(nothing.new_zeros(_NUM + 1))
                holds.append(nothing)
                continue
            gave.append(torch.cat([moved(sums, device, wide), one]))
            holds.append(moved(self._sums(grad.detach()), device, wide))
        return torch.stack(gave), torch.stack(holds)

    def forget(self) -> None:
        """Listen no more, and keep nothing. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._brought = [], {}

    @staticmethod
    def tables(num: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums that travel."""
        return {BROUGHT: (num, _NUM + 1), HELD: (2, num, _NUM)}


def _signs() -> Tensor:
    """Return plus and minus ones, the same on all ranks, shape (4096, 4)."""
    drawn = torch.randint(0, 2, (_BLOCK, _NUM), generator=torch.Generator().manual_seed(0))
    return drawn * 2 - 1


def farther_rank(host: Mapping[str, Any], positions: Sequence[int] | np.ndarray[Any, Any]) -> int:
    """Return which of two ranks holds gradients that are not the mean of what both brought; -1 where it can't be told.

    Args:
        host: what has travelled.
        positions: of the parameters whose gradients differ.
    """
    if BROUGHT not in host or not len(positions):
        return -1
    brought, held = host[BROUGHT][positions], host[HELD][:, positions]
    if not (brought[:, _NUM] == 2).all() or not np.isfinite(brought).all():
        return -1
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.sqrt(np.square(held - brought[:, :_NUM] / 2).sum(axis=(1, 2)))
    known = np.isfinite(off)
    if known.all():
        return int(off.argmax()) if off.max() > _FARTHER * off.min() else -1
    return int(np.flatnonzero(~known)[0]) if known.any() else -1
