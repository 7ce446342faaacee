"""Clipping each output unit's gradient against the unit's own weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..protocols import Context
from ..records import select_paths
from ..stats import tensor_norms
from ..torchside import is_host, moved, shape_of
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_number, check_patterns
from ._clip import norm_coefficient
from ._tensors import scale_, summed
from ._units import FIRST_AXIS, UnitLayout, head_paths, unit_layouts, unit_norms, unit_view

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["AdaptiveClip", "adaptive_clip_"]


@torch.no_grad()
def adaptive_clip_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    ratio: float = 0.01,
    *,
    floor: float = 1e-3,
    layouts: Sequence[UnitLayout] | None = None,
    norms: Tensor | None = None,
    limit_scale: float | Tensor = 1.0,
) -> tuple[Tensor, int]:
    """Clip the gradient of every output unit to `ratio` times the norm of its weights; return (clipped, units).

    Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021, arXiv 2102.06171:
    each unit's gradient g with weights w is multiplied by min(1, ratio max(|w|, floor) / |g|). Tensors of fewer than
    two dimensions are one unit; of sparse gradients each explicit row. The floor lets weights that begin at zero train
    at all. A tensor whose norm is not finite stays as it is.

    Args:
        params: weights.
        grads: their gradients, changed in place.
        ratio: the largest allowed gradient norm relative to the weights'.
        floor: under the weights' norm.
        layouts: where the units lie; None: on the first axis everywhere.
        norms: of the gradients as they are, where they are known; float64 (n,).
        limit_scale: to multiply every limit by: a loss scale that is still in `grads`; inf leaves them alone.

    Returns:
        How many units were clipped (0-dim int64) and how many there are, on this rank.
    """
    norms = tensor_norms(grads) if norms is None else norms
    scale: float | Tensor = torch.ones((), dtype=norms.dtype, device=norms.device) * ratio * limit_scale
    wholes: list[Any] = list(norms.unbind())
    if is_host(norms.device):
        # Where reading is free, numbers are faster than tensors of one.
        scale, wholes = float(scale), norms.tolist()
    small = [i for i, grad in enumerate(grads) if len(shape_of(grad)) < 2]
    units = len(small)
    counts = [_clip_small_([params[i] for i in small], [grads[i] for i in small], _rows(norms, small), floor, scale)]
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if len(shape_of(grad)) < 2:
            continue
        layout = FIRST_AXIS if layouts is None else layouts[i]
        if grad.is_sparse:
            whole = grad.coalesce()
            view, found = whole.values(), unit_norms(whole.values())
            weights = unit_norms(param.detach().index_select(0, whole.indices()[0]))
        else:
            view, found, weights = unit_view(grad, layout)[0], unit_norms(grad, layout), unit_norms(param, layout)
        units += found.numel()
        # One tensor after the other, so that its gradient is still in the cache when it is scaled.
        counts.append(_clip_units_(view, found, _limits(weights, floor, scale), wholes[i]))
        if grad.is_sparse and not grad.is_coalesced():
            grad.copy_(whole)
    return summed(counts), units


def _rows(values: Tensor, positions: Sequence[int]) -> Tensor:
    """Return some entries of a vector; indexing by a list would make the host wait for its copy to the device."""
    if len(positions) == len(values):
        return values
    entries = values.unbind()
    return torch.stack([entries[i] for i in positions]) if positions else values[:0]


def _limits(weights: Tensor, floor: float, scale: float | Tensor) -> Tensor:
    """Return the limits of units whose weights have these norms, which are overwritten."""
    return weights.clamp_(min=floor).mul_(moved(scale, weights.device) if isinstance(scale, Tensor) else scale)


def _clip_small_(
    params: Sequence[Tensor], grads: Sequence[Tensor], norms: Tensor, floor: float, scale: float | Tensor
) -> Tensor:
    """Scale gradients that are one unit each; return how many were above their limit."""
    coefficients = norm_coefficient(norms, tensor_norms(params, of=params).clamp(min=floor) * scale) if grads else norms
    scale_(grads, coefficients)
    return (coefficients < 1).sum()


def _clip_units_(view: Tensor, norms: Tensor, limits: Tensor, whole: float | Tensor) -> Tensor:
    """Scale the units of one gradient to their limits; return how many were above."""
    largest = torch.finfo(norms.dtype).max
    if not isinstance(whole, Tensor):
        # A unit's norm may leave float32 where the tensor's, in float64, doesn't: it is at most that.
        coefficients = limits.div_(norms.clamp_(max=min(whole, largest))) if math.isfinite(whole) else limits
        if not math.isfinite(whole) or float(coefficients.min() if norms.numel() else 1.0) >= 1:
            return torch.zeros((), dtype=torch.int64)
        coefficients.clamp_(max=1.0)
    else:
        whole = moved(whole, norms.device)
        norms = torch.minimum(norms, whole.clamp(max=largest).to(norms.dtype))
        coefficients = torch.where(torch.isfinite(whole), (limits / norms).clamp(max=1.0), 1.0)
    view.mul_(coefficients)
    return torch.count_nonzero(coefficients < 1)


@dataclass(frozen=True, eq=False)
class AdaptiveClip(BaseTreatment):
    """Clip each output unit's gradient to `ratio` times the norm of the unit's weights (AGC).

    Made for networks without normalisation layers. A healthy run of another kind may train several times slower.

    Args:
        ratio: the largest allowed gradient norm relative to the weights'.
        floor: under the weights' norm.
        head: parameters that are left alone: "auto", those of the last layer, as the paper advises; glob patterns; or
            None.
        paths: glob patterns of parameters.
    """

    ratio: float = 0.01
    floor: float = field(default=1e-3, kw_only=True)
    head: str | Sequence[str] | None = field(default="auto", kw_only=True)
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    _memory: _Model = field(default_factory=lambda: _Model(), init=False, repr=False)
    order: ClassVar[int] = 40

    def __post_init__(self) -> None:
        check_number(self, "ratio", self.ratio, above=0)
        check_number(self, "floor", self.floor, above=0)
        check_patterns(self, "paths", self.paths)
        if self.head is not None:
            check_patterns(self, "head", self.head)

    def bind(self, model: nn.Module) -> None:
        """Find the last layer, and the axis of the output units of every weight."""
        super().bind(model)
        self._memory.layouts = unit_layouts(model)
        self._memory.head = head_paths(model)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        if self._memory.head is None:
            # Nobody showed us the model: of the gradients seen first, the last weight's layer.
            self._memory.head = _last_layer(grads.paths, [len(shape_of(p)) for p in grads.params])
        part = chosen(grads, self.paths)
        head = self._is_head(part.paths)
        kept = [i for i, is_head in enumerate(head) if not is_head]
        trigger = read_trigger(context)
        if not kept or trigger is False:
            return {"applied": 0.0} if kept else None
        scale = torch.ones_like(part.global_norm) * part.grad_scale
        norms = part.norms * scale
        limit_scale = where_triggered(trigger, scale, torch.inf)
        # Statistics of a broken step say nothing: it is a guard's to judge.
        limit_scale = torch.where(torch.isfinite(part.global_norm), limit_scale, torch.inf)
        params, tensors, paths = part.params, part.grads, part.paths
        clipped, units = adaptive_clip_(
            [params[i] for i in kept],
            [tensors[i] for i in kept],
            self.ratio,
            floor=self.floor,
            layouts=[self._memory.layouts.get(paths[i], FIRST_AXIS) for i in kept],
            norms=_rows(norms, kept),
            limit_scale=limit_scale,
        )
        if not is_host(clipped.device) or int(clipped):
            part.touch()
        return {"applied": clipped > 0, "clipped_share": clipped / max(units, 1), "units": float(units)}

    def _is_head(self, paths: Sequence[str]) -> list[bool]:
        if self.head is None:
            return [False] * len(paths)
        if self.head == "auto":
            assert self._memory.head is not None
            return [path in self._memory.head for path in paths]
        return select_paths(paths, self.head).tolist()


@dataclass
class _Model:
    """What is known of the model."""

    layouts: dict[str, UnitLayout] = field(default_factory=dict)
    head: frozenset[str] | None = None


def _last_layer(paths: Sequence[str], ndims: Sequence[int]) -> frozenset[str]:
    last = next((p for p, ndim in zip(reversed(paths), reversed(ndims), strict=True) if ndim >= 2), None)
    if last is None:
        return frozenset()
    owner = last.rpartition(".")[0]
    return frozenset(path for path in paths if path == last or (owner and path.rpartition(".")[0] == owner))
