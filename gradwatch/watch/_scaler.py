"""Loss scalers: whether gradients still carry the scale, and how to take it out in good time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["scale_left_in_gradients", "unscale"]


def _is_unscaled(scaler: Any, optimizer: Optimizer) -> bool:
    # Private, but the only place that knows (O2): a fused optimizer's gradients, and those of a step whose last
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
