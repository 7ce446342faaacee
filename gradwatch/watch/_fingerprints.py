"""A number by which the batch of a step is known again: a checksum over a fixed sample of its elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..torchside import Aside, WeakHook, checksum, declassed, moved, tensors_of, wide_dtype

__all__ = ["PRINTS", "Fingerprints", "fingerprint_scalars", "sample_of"]

PRINTS = "fingerprints"
"""Name of what travels: sums that have a row for each rank."""
ENTRIES = 256
"""Of each tensor of a batch."""
_MAX_TENSORS = 8
_WIDE, _NARROW = 48, 24
"""Bits of a fingerprint, in devices' numbers of eight bytes and of four: whole numbers that these hold exactly."""
_FACTOR = 6364136223846793005


class Fingerprints:
    """Adds up what a step's batches are known by: what `see` is shown, and what the model's forward passes are given.

    Args:
        model: whose training forwards are listened to.
        device: gives where numbers are put together.
        is_wanted: whether the batch at hand is to be known again.
    """

    def __init__(self, model: nn.Module, device: Callable[[], torch.device], is_wanted: Callable[[], bool]) -> None:
        self._device, self.is_wanted = device, is_wanted
        self._now: Tensor | None = None
        self.failure = ""
        self._handle = WeakHook.of(self._before).hang(model.register_forward_pre_hook, with_kwargs=True)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled() and not self.failure and self.is_wanted():
            self.see([args, kwargs])

    def see(self, batch: Any) -> None:
        """Take a batch in. Reads nothing back, and never raises: this runs within the user's forward."""
        try:
            with Aside():
                for i, (_, tensor) in enumerate(tensors_of(batch, objects=True)):
                    if i == _MAX_TENSORS:
                        break
                    self._add(tensor)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"

    def _add(self, tensor: Tensor) -> None:
        sample = sample_of(declassed(tensor))
        if sample is None:
            return
        code = moved(checksum(sample), self._device())
        self._now = code if self._now is None else self._now * _FACTOR + code

    def take(self) -> Tensor | None:
        """Return the step's fingerprint, a whole number in the widest floats, and begin anew; None where no batch was
        seen."""
        found, self._now = self._now, None
        if found is None:
            return None
        wide = wide_dtype(found.device)
        return (found & ((1 << (_WIDE if wide is torch.float64 else _NARROW)) - 1)).to(wide)

    def close(self) -> None:
        """Take the hook off. May be called twice."""
        self._handle.remove()
        self._now = None


def sample_of(tensor: Tensor) -> Tensor | None:
    """Return some `ENTRIES` entries from all over a tensor, always the same places; None of one without elements that
    can be looked at."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return None
    if not tensor.numel():
        return None
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        # Not all of it is copied into a row: of the first dimension some slices.
        tensor = tensor[:: max(1, len(tensor) // 8)] if tensor.dim() else tensor
    flat = tensor.reshape(-1)
    return flat[:: -(-len(flat) // ENTRIES)].contiguous()


def fingerprint_scalars(host: Mapping[str, Any]) -> dict[str, float]:
    """Return the fingerprint of all ranks' batches, and how many ranks had one that another had, too; nothing where not
    every rank's batch was seen."""
    rows = host.get(PRINTS)
    if rows is None or not (rows[:, 1] == 1).all():
        return {}
    prints = [int(x) for x in rows[:, 0]]
    whole = 0
    for one in prints:
        whole = (whole * _FACTOR + one) % (1 << _WIDE)
    alike = sum(count for count in Counter(prints).values() if count > 1)
    return {"batch_fingerprint": float(np.float64(whole)), "ranks_alike": float(alike)}
