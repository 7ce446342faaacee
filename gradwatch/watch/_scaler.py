"""Loss scalers: whether gradients still carry the scale, and how to take it out in good time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..torchside import is_host
from ._transfer import Transfer

__all__ = ["ScaleReader", "scale_left_in_gradients", "unscale"]


class ScaleReader:
    """Reads a scaler's scale once for each of its updates.

    `scaler.get_scale()` makes the host wait for all that a device was given to do. The copy that `begin` sends for,
    before a forward pass is queued, has arrived by the time that its number is needed.
    """

    def __init__(self) -> None:
        self._of: tuple[Tensor, int] | None = None
        self._copy: Transfer | None = None

    def begin(self, scaler: Any) -> None:
        """Send for the scale, where it is on a device and was updated since the last time."""
        scale = getattr(scaler, "_scale", None)
        if not isinstance(scale, Tensor) or is_host(scale.device):
            return
        if self._of is None or self._of[0] is not scale or self._of[1] != scale._version:
            self._of, self._copy = (scale, scale._version), Transfer({"scale": scale})

    def read(self, scaler: Any) -> float:
        """Return the scale as it is now; 1 where there is no scaler."""
        if scaler is None:
            return 1.0
        if not isinstance(getattr(scaler, "_scale", None), Tensor) or is_host(scaler._scale.device):
            return float(scaler.get_scale())
        self.begin(scaler)
        assert self._copy is not None
        return float(self._copy.result()["scale"])


def _is_unscaled(scaler: Any, optimizer: Optimizer) -> bool:
    # Private, but the only place that knows: a fused optimizer's gradients, and those of a step whose last
    # micro-batch gave no loss, come scaled.
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and getattr(state["stage"], "name", "") == "UNSCALED"


def _handles_scale(optimizer: Optimizer) -> bool:
    """Whether the optimizer unscales by itself inside its step (fused ones do, C7)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def scale_left_in_gradients(scaler: Any, optimizer: Optimizer) -> float | Tensor:
    """Return what `.grad` is still multiplied by: 1 once unscaled, else the scaler's scale, without a host read."""
    if not scaler.is_enabled() or _is_unscaled(scaler, optimizer):
        return 1.0
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else float(scaler.get_scale())


def unscale(scaler: Any, optimizer: Optimizer) -> None:
    """Unscale gradients ahead of `scaler.step`, which would do the very same; fused optimizers are left to it."""
    held = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
    if held and not _handles_scale(optimizer) and not _is_unscaled(scaler, optimizer):
        scaler.unscale_(optimizer)
