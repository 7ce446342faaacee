"""Clipping elements that stand out from Adam's second moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._warn import warn
from ..protocols import Context
from ..torchside import is_host, moved
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_number, check_patterns
from ._optimizer_state import second_moment
from ._tensors import Scratch, chunks, local_part, summed

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["SpikeClip", "spike_clip_"]


@torch.no_grad()
def spike_clip_(
    grads: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    threshold: float = 5000.0,
    *,
    limit_scale: float | Tensor = 1.0,
) -> Tensor:
    """Clip every element g with g**2 > threshold v to sign(g) sqrt(threshold v); return how many, 0-dim int64.

    Huang et al., "SPAM: spike-aware Adam with momentum reset for stable LLM training", ICLR 2025, arXiv 2501.06842.
    Elements whose second moment is exactly 0 have no past to stand out from and stay. NaN stays NaN.

    Args:
        grads: changed in place.
        second_moments: running means of squared gradients, of the same shapes.
        threshold: from which a square is a spike.
        limit_scale: to multiply limits by: a loss scale that is still in `grads`; inf leaves them alone.
    """
    counts: list[Tensor] = []
    scratch = Scratch()
    for grad, second in zip(grads, second_moments, strict=True):
        values, moments = local_part(grad), local_part(second)
        on_cpu = is_host(values.device)
        if on_cpu and values.stride() == moments.stride():
            parts = list(zip(chunks(values), chunks(moments), strict=True))
        else:
            parts = [(values, moments)]
        for value, moment in parts:
            if not on_cpu or _may_have_spike(value, moment, threshold, float(limit_scale), scratch):
                counts.append(_clip_(value, moment, threshold, limit_scale))
    if not counts:
        return torch.zeros((), dtype=torch.int64)
    return summed(counts)


def _may_have_spike(values: Tensor, moments: Tensor, threshold: float, scale: float, scratch: Scratch) -> bool:
    """Return whether any element may be above its limit: three cheap passes, where `_clip_` takes many dear ones."""
    if not values.numel() or values.dtype != moments.dtype or values.dtype.itemsize < 4:
        return bool(values.numel())
    squares = torch.mul(values, values, out=scratch.like(values))
    # Not `> 0`: nan must not pass for "none".
    return not float(squares.sub_(moments, alpha=threshold * scale**2).max()) <= 0


def _clip_(values: Tensor, moments: Tensor, threshold: float, scale: float | Tensor) -> Tensor:
    wide = _wide(values)
    scale = moved(scale, values.device) if isinstance(scale, Tensor) else scale
    limits = moments.to(wide).mul(threshold).sqrt_()
    limits = torch.where(limits > 0, limits * scale, torch.inf).to(wide)
    outside = values.abs() > limits
    values.copy_(torch.where(outside, torch.copysign(limits, values), values))
    return torch.count_nonzero(outside)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class SpikeClip(BaseTreatment):
    """Clip single elements that stand out from the second moment in the optimizer's own state (SPAM).

    Needs an optimizer of Adam's kind (or RMSprop); under another one a warning says that nothing is done. It acts from
    the second step on, when there is a second moment.

    Args:
        threshold: clip where the square is more than so many times the second moment.
        paths: glob patterns of parameters.
    """

    threshold: float = 5000.0
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: dict[str, bool] = field(default_factory=dict, init=False, repr=False)
    order: ClassVar[int] = 42

    def __post_init__(self) -> None:
        check_number(self, "threshold", self.threshold, above=0)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        found = [(g, second_moment(context.optimizers, p)) for p, g in zip(part.params, part.grads, strict=True)]
        # A sparse gradient's optimizer keeps another second moment.
        pairs = [(g, v) for g, v in found if v is not None and not g.is_sparse]
        if not pairs:
            self._warn_where_it_never_acts(context)
            return {"applied": 0.0, "clipped_share": 0.0}
        trigger = read_trigger(context)
        if trigger is False:
            return {"applied": 0.0, "clipped_share": 0.0}
        whole = part.global_norm
        scale = where_triggered(trigger, torch.ones_like(whole) * part.grad_scale, torch.inf)
        scale = torch.where(torch.isfinite(whole), scale, torch.inf)
        if is_host(scale.device) and bool(torch.isinf(scale)):
            return {"applied": 0.0, "clipped_share": 0.0}
        clipped = spike_clip_([g for g, _ in pairs], [v for _, v in pairs], self.threshold, limit_scale=scale)
        if not is_host(clipped.device) or int(clipped):
            part.touch()
        return {"applied": clipped > 0, "clipped_share": clipped / sum(g.numel() for g, _ in pairs)}

    def _warn_where_it_never_acts(self, context: Context) -> None:
        optimizers = [getattr(o, "optimizer", o) for o in context.optimizers]
        # Before its first step an optimizer of the right kind has no state, either.
        may_come = any(not o.state and {"betas", "alpha"} & set(o.defaults) for o in optimizers)
        if may_come or not optimizers or self._memory.get("warned"):
            return
        self._memory["warned"] = True
        names = ", ".join(sorted({type(o).__name__ for o in optimizers}))
        warn(
            f"SpikeClip: {names} keeps no second moment of gradients in its state, so nothing is clipped. "
            "ZClip works with every optimizer.",
            stacklevel=2,
        )
