"""Clipping norms that stand out from their own past, by z-score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..protocols import Context
from ..torchside import moved, wide_dtype
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_count, check_number, check_patterns
from ._clip import norm_coefficient

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["ZClip", "zclip", "zclip_memory"]

# Squares of larger norms leave the range.
_LARGEST_NORM = {torch.float64: 1e150, torch.float32: 1e18}


def zclip_memory(device: torch.device | str = "cpu") -> Tensor:
    """Return the memory before the first step: (3,), steps counted, mean and variance of the norm."""
    return torch.zeros(3, dtype=wide_dtype(torch.device(device)), device=device)


@torch.no_grad()
def zclip(
    norm: Tensor, memory: Tensor, *, z: float = 2.5, alpha: float = 0.97, warmup: int = 25
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coefficient for a gradient of this norm, its limit (inf where it stays), and the next memory.

    Kumar et al., "ZClip: adaptive spike mitigation for LLM pre-training", 2025, arXiv 2504.02507: with the moving mean
    m and deviation s of past norms, a norm n with (n - m) / s > z is clipped to m + z**2 s / ((n - m) / s), and the
    moving averages are fed the clipped norm. We differ in three things: a norm that is not finite changes neither
    gradient nor memory (in the published package one NaN switches the clip off for ever); the small number that keeps
    the z-score finite is relative to the mean, so that the clip does not depend on the gradient's scale; and gradients
    are never scaled to zero.

    Args:
        norm: of the whole gradient, 0-dim.
        memory: of `zclip_memory`.
        z: score from which to clip.
        alpha: of the moving averages; their memory is about 1 / (1 - alpha) steps.
        warmup: steps that are averaged alike, and not clipped.
    """
    norm = norm.to(memory.dtype)
    count, mean, variance = memory.unbind()
    usable = norm < _LARGEST_NORM[norm.dtype]
    is_warm = count < warmup
    score = (norm - mean) / (variance.sqrt() + 1e-6 * mean)
    limit = mean + z * z * variance.sqrt() / score
    clips = usable & ~is_warm & (score > z) & (limit > 0)
    limit = torch.where(clips, limit, torch.inf)
    kept = torch.minimum(norm, limit)

    weight = torch.where(is_warm, 1 / (count + 1), 1 - alpha)
    new_mean = mean + weight * (kept - mean)
    # Welford's step while all count alike, then the published one, which takes the distance from the new mean.
    square = torch.where(is_warm, (kept - mean) * (kept - new_mean), (kept - new_mean) ** 2)
    new_variance = variance + weight * (square - variance)
    updated = torch.stack([count + 1, new_mean, new_variance])
    return torch.where(clips, limit / norm, 1.0), limit, torch.where(usable, updated, memory)


@dataclass(frozen=True, eq=False)
class ZClip(BaseTreatment):
    """Clip the whole gradient where its norm stands out from its own past by more than `z` deviations.

    The safest of the adaptive clips: a healthy run loses nothing, a spike is cut to the usual size.

    Args:
        z: deviations from which to clip.
        alpha: of the moving mean and variance of the norm.
        warmup: steps at the start that only count.
        warmup_max_norm: limit during these steps; None: none.
        paths: glob patterns of the parameters that count, and are scaled.
    """

    z: float = 2.5
    alpha: float = field(default=0.97, kw_only=True)
    warmup: int = field(default=25, kw_only=True)
    warmup_max_norm: float | None = field(default=None, kw_only=True)
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    learns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "z", self.z, above=0)
        check_number(self, "alpha", self.alpha, above=0, below=1)
        check_count(self, "warmup", self.warmup, at_least=2)
        check_number(self, "warmup_max_norm", self.warmup_max_norm, above=0, optional=True)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        norm = part.global_norm
        memory = moved(self._memory.get("norm", zclip_memory()), norm.device, norm.dtype)
        fixed = self._warmup_coefficient(norm, memory)
        coefficient, limit, self._memory["norm"] = zclip(
            norm * fixed, memory, z=self.z, alpha=self.alpha, warmup=self.warmup
        )
        coefficient = where_triggered(read_trigger(context), coefficient * fixed, 1.0)
        part.mul_(coefficient)
        return {"coefficient": coefficient, "limit": limit, "applied": coefficient < 1, "mean": memory[1]}

    def state_dict(self) -> dict[str, Any]:
        return {name: value.detach().cpu().clone() for name, value in self._memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory.clear()
        self._memory.update({name: value.clone() for name, value in state.items()})

    def _warmup_coefficient(self, norm: Tensor, memory: Tensor) -> Tensor:
        """Return the coefficient of the fixed limit while warming up, 1 afterwards."""
        if self.warmup_max_norm is None:
            return torch.ones_like(norm)
        return norm_coefficient(norm, torch.where(memory[0] < self.warmup, self.warmup_max_norm, torch.inf))
