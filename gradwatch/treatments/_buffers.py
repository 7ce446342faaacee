"""Keeping the last good copy of a model's buffers: a bad batch poisons running statistics in forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._warn import warn
from ..torchside import clean_path

__all__ = ["BufferKeeper"]


class BufferKeeper:
    """Copies of a model's buffers (BatchNorm's running statistics, ...), to be put back when a step is skipped.

    By the time a NaN is seen in the gradients, forward has written it into the running statistics. `keep()` after a
    good step, `restore()` at a skipped one. The copies are made once and written over.

    Args:
        model: whose buffers.
        memory_limit_bytes: for all copies; the largest buffers are left out first (masks and caches are large and
            don't change), with one warning.

    Attributes:
        left_out: paths of buffers that are not kept.
    """

    def __init__(self, model: nn.Module, *, memory_limit_bytes: int = 64 * 2**20) -> None:
        self.left_out: tuple[str, ...] = ()
        # Where a buffer is found again: modules may put a new tensor in its place.
        self._places: list[tuple[dict[str, Tensor | None], str]] = []
        self._kept: list[Tensor] = []
        self._has_copy = False
        self._find(model, memory_limit_bytes)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers as they are now."""
        self._copy(restore=False)
        self._has_copy = True

    @torch.no_grad()
    def restore(self) -> bool:
        """Put the last copy back; return False where there is none yet."""
        if self._has_copy:
            self._copy(restore=True)
        return self._has_copy

    def _find(self, model: nn.Module, memory_limit_bytes: int) -> None:
        found: dict[int, tuple[str, dict[str, Tensor | None], str, Tensor]] = {}
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_sparse and not buffer.is_meta:
                    full = clean_path(f"{path}.{name}" if path else name)
                    found.setdefault(id(buffer), (full, module._buffers, name, buffer))
        used, left_out = 0, []
        for path, owner, name, buffer in sorted(found.values(), key=lambda item: item[3].numel()):
            used += buffer.numel() * buffer.element_size()
            if used > memory_limit_bytes:
                left_out.append(path)
                continue
            self._places.append((owner, name))
            self._kept.append(torch.empty_like(buffer))
        self.left_out = tuple(left_out)
        if left_out:
            warn(
                f"{len(left_out)} of {len(found)} buffers are not kept for skipped steps, since they need more than "
                f"{memory_limit_bytes / 2**20:g} MiB: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}.",
                stacklevel=4,
            )

    def _copy(self, *, restore: bool) -> None:
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for i, (owner, name) in enumerate(self._places):
            live, kept = owner.get(name), self._kept[i]
            if live is None:
                continue
            if live.shape != kept.shape or live.dtype != kept.dtype or live.device != kept.device:
                if restore:
                    continue
                kept = self._kept[i] = torch.empty_like(live)
            lives, kepts = groups.setdefault((live.device, live.dtype, type(live)), ([], []))
            lives.append(live)
            kepts.append(kept)
        for lives, kepts in groups.values():
            torch._foreach_copy_(*((lives, kepts) if restore else (kepts, lives)))
