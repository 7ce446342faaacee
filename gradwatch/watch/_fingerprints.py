"""A number by which the batch of a step is known again: a checksum over a fixed sample of its elements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..stats import At, Number, Ranks
from ..torchside import Aside, WeakHook, checksum, declassed, moved, tensors_of, wide_dtype, world_size
from ._measurement import Measurement, StepView
from ._model_meter import ModelMeter
from ._options import MeasureOptions

__all__ = ["Fingerprints", "sample_of"]

ENTRIES = 256
"""Of each tensor of a batch."""
_MAX_TENSORS = 8
_WIDE, _NARROW = 48, 24
"""Bits of a fingerprint, in devices' numbers of eight bytes and of four: whole numbers that these hold exactly."""
_FACTOR = 6364136223846793005


class Fingerprints(Measurement):
    """Adds up what a step's batches are known by: what `see` is shown, and what the model's forward passes are given.

    On several ranks each tells the others where it has batches of its own, so that ranks with the same one are found:
    also where `fingerprints` was not asked for, at the steps at which modules are sampled.

    Attributes:
        is_wanted: whether the batch at hand is to be known again.
        failure: why it listens no more; "" while it does.
    """

    part = "knowing batches again"
    gives = ("batch_fingerprint", "ranks_alike")
    of_gradients = False
    is_light = True

    def __init__(self, meter: ModelMeter) -> None:
        super().__init__(meter)
        self.is_wanted: Callable[[], bool] = lambda: True
        self._now: Tensor | None = None
        self.failure = ""
        self._handle = WeakHook.of(self._before).hang(meter.model.register_forward_pre_hook, with_kwargs=True)

    @classmethod
    def is_on(cls, options: MeasureOptions) -> bool:
        return options.fingerprints or (world_size() > 1 and options.activations_every is not None)

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
        code = moved(checksum(sample), self.meter.device)
        self._now = code if self._now is None else self._now * _FACTOR + code

    def take(self) -> Tensor | None:
        """Return the step's fingerprint, a whole number in the widest floats, and begin anew; None where no batch was
        seen."""
        found, self._now = self._now, None
        if found is None:
            return None
        wide = wide_dtype(found.device)
        return (found & ((1 << (_WIDE if wide is torch.float64 else _NARROW)) - 1)).to(wide)

    def tables(self, ranks: Ranks) -> Mapping[str, tuple[int, ...]]:
        is_shared = ranks.num > 1 and ranks.has_batches and (ranks.is_sampled or self.meter.options.fingerprints)
        return {"prints": (ranks.num, 2)} if is_shared else {}

    def look(self, view: StepView, tables: dict[str, Tensor]) -> Mapping[str, Number] | None:
        found = self.take()
        if found is not None and tables:
            tables["prints"][view.rank] = moved(torch.stack([found, torch.ones_like(found)]), tables["prints"].device)
        return {"own": found} if found is not None and view.ranks.num == 1 else None

    def at_once(self, step: int) -> Mapping[str, float]:
        found = self.take()
        return {} if found is None else {"batch_fingerprint": float(found)}

    def conclude(self, found: Mapping[str, Any]) -> Mapping[str, float | At]:
        if "own" in found:
            return {"batch_fingerprint": float(found["own"])}
        rows = found.get("prints")
        return {} if rows is None or not (rows[:, 1] == 1).all() else _among([int(x) for x in rows[:, 0]])

    def forget(self) -> None:
        self._now = None

    def close(self) -> None:
        self._handle.remove()
        self.forget()


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


def _among(prints: Sequence[int]) -> dict[str, float]:
    """Return the fingerprint of all ranks' batches, and how many ranks had one that another had, too."""
    whole = 0
    for one in prints:
        whole = (whole * _FACTOR + one) % (1 << _WIDE)
    alike = sum(count for count in Counter(prints).values() if count > 1)
    return {"batch_fingerprint": float(np.float64(whole)), "ranks_alike": float(alike)}
