"""Clips with a fixed limit: of the whole gradient, of each tensor, of each element; and to a rule's own limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..protocols import Context
from ..stats import global_norm, tensor_norms
from ..torchside import is_host, moved, wide_dtype
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_choice, check_number, check_patterns
from ._grad_output import GradOutputHandle, at_grad_output
from ._tensors import Scratch, chunks, on_values_, scale_, summed, times

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = [
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipToLimit",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "norm_coefficient",
]


def norm_coefficient(norms: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return what to multiply by so that no norm exceeds `max_norm`: at most 1, and 1 for a norm that is not finite.

    A NaN must not spread and an inf must not zero the rest (torch's clip does both): what is not finite stays as it
    is, for a guard to find.
    """
    return torch.where(torch.isfinite(norms), (max_norm / norms).clamp(max=1.0), 1.0)


@torch.no_grad()
def clip_by_global_norm_(grads: Sequence[Tensor], max_norm: float | Tensor) -> Tensor:
    """Scale all gradients alike so that their norm as one vector is at most `max_norm`; return the norm before.

    As `torch.nn.utils.clip_grad_norm_` (Pascanu et al., "On the difficulty of training recurrent neural networks",
    ICML 2013, arXiv 1211.5063), without its 1e-6 in the denominator, and a norm that is not finite changes nothing.
    """
    norm = global_norm(tensor_norms(grads))
    scale_(grads, norm_coefficient(norm, max_norm))
    return norm


@torch.no_grad()
def clip_by_norm_(grads: Sequence[Tensor], max_norm: float | Tensor) -> Tensor:
    """Scale each gradient on its own so that its norm is at most `max_norm`; return the norms before, shape (n,)."""
    norms = tensor_norms(grads)
    scale_(grads, norm_coefficient(norms, max_norm))
    return norms


@torch.no_grad()
def clip_by_value_(grads: Sequence[Tensor], max_value: float | Tensor) -> Tensor:
    """Clamp every element to [-max_value, max_value]; return how many were outside, 0-dim int64 of this rank.

    NaN stays NaN; inf becomes the limit: ask for the norm first where that matters.
    """
    if not grads:
        return torch.zeros((), dtype=torch.int64)
    counts: list[Tensor] = []
    scratch = Scratch()

    def clamp_(values: Tensor) -> None:
        if is_host(values.device):
            counts.append(torch.tensor(_clamp_on_cpu_(values, float(max_value), scratch), dtype=torch.int64))
            return
        bound = moved(max_value, values.device) if isinstance(max_value, Tensor) else max_value
        limit = torch.ones((), dtype=values.dtype, device=values.device) * bound
        counts.append(torch.count_nonzero(values.abs() > limit))
        values.clamp_(min=-limit, max=limit)

    for grad in grads:
        on_values_(grad, clamp_)
    return summed(counts)


@dataclass(frozen=True, eq=False)
class ClipByGlobalNorm(BaseTreatment):
    """Scale the whole gradient so that its norm is at most `max_norm`.

    Args:
        max_norm: the largest norm allowed, of unscaled gradients.
        paths: glob patterns of the parameters that count, and are scaled.
    """

    max_norm: float
    paths: str | Sequence[str] = field(default="*", kw_only=True)

    def __post_init__(self) -> None:
        check_number(self, "max_norm", self.max_norm, above=0)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        return clip_to_(chosen(grads, self.paths), context, self.max_norm)


@dataclass(frozen=True, eq=False)
class ClipToLimit(BaseTreatment):
    """Scale the whole gradient down to the limit of the rule that this treatment stands behind.

    The rule computes its limit from past steps alone, so the present norm meets it on the device: nothing waits for
    the rule's verdict. Without a limit (the rule is warming up, or has none) nothing is changed.
    """

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        limit = context.limit
        if limit is None or (not isinstance(limit, Tensor) and not (0 < limit < math.inf)):
            return None
        return clip_to_(grads, context, limit)


@dataclass(frozen=True, eq=False)
class ClipByNorm(BaseTreatment):
    """Scale each parameter's gradient, or each module's error signal, so that its norm is at most `max_norm`.

    Args:
        max_norm: the largest norm allowed, of each tensor on its own.
        paths: glob patterns of parameters, or of modules with `at="grad_output"`.
        at: `"grad"`, before the optimizer step; `"grad_output"`, inside backward, where it also changes the module's
            own weight gradients and all that lies upstream.
    """

    max_norm: float
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    at: Literal["grad", "grad_output"] = field(default="grad", kw_only=True)
    _handles: list[GradOutputHandle] = field(default_factory=list, init=False, repr=False)
    order: ClassVar[int] = 43

    def __post_init__(self) -> None:
        check_number(self, "max_norm", self.max_norm, above=0)
        check_patterns(self, "paths", self.paths)
        check_choice(self, "at", self.at, ("grad", "grad_output"))

    def install(self, model: nn.Module) -> GradOutputHandle | None:
        """Clip error signals of the model's modules inside backward, until the handle is removed."""
        if self.at != "grad_output":
            return None
        handle = at_grad_output(model, self.paths, self.clipped)
        self._handles[:] = [handle]
        return handle

    def clipped(self, grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the error signal clipped, and the coefficient; `scale` is what the loss was multiplied by."""
        coefficient = norm_coefficient(tensor_norms([grad])[0], self.max_norm * scale)
        return times(grad, coefficient), coefficient

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        if self.at == "grad_output":
            return self._handles[0].take_report() if self._handles else None
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        coefficients = where_triggered(read_trigger(context), norm_coefficient(part.norms, self.max_norm), 1.0)
        # One tensor that is not finite leaves the others alone, too: the step is a guard's to judge.
        coefficients = torch.where(torch.isfinite(part.global_norm), coefficients, 1.0)
        part.mul_(coefficients)
        return {**tensor_report(coefficients), "limit": self.max_norm}


@dataclass(frozen=True, eq=False)
class ClipByValue(BaseTreatment):
    """Clamp every element of the gradients to [-max_value, max_value]. Changes the direction.

    Args:
        max_value: the largest magnitude allowed, of unscaled gradients.
        paths: glob patterns of parameters.
    """

    max_value: float
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    order: ClassVar[int] = 44

    def __post_init__(self) -> None:
        check_number(self, "max_value", self.max_value, above=0)
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        trigger = read_trigger(context)
        if not len(part) or trigger is False:
            return {"applied": 0.0} if len(part) else None
        tensors = part.grads
        whole = sum(tensor.numel() for tensor in tensors)
        norms = part.norms
        if is_host(norms.device):
            # No element exceeds its tensor's norm: most tensors of a healthy step need no look at all.
            large = (norms > self.max_value).tolist() if math.isfinite(float(part.global_norm)) else []
            tensors = [tensor for tensor, is_large in zip(tensors, large, strict=False) if is_large]
            if not tensors:
                return {"applied": 0.0, "clipped_share": 0.0, "limit": self.max_value}
        limit = torch.full_like(part.global_norm, self.max_value) * part.grad_scale
        limit = torch.where(torch.isfinite(part.global_norm), where_triggered(trigger, limit, math.inf), math.inf)
        outside = clip_by_value_(tensors, limit)
        part.touch()
        return {"applied": outside > 0, "clipped_share": outside / whole, "limit": self.max_value}


def _clamp_on_cpu_(values: Tensor, limit: float, scratch: Scratch) -> int:
    """Clamp in place and return how many were outside: several times faster than with masks and tensors as bounds."""
    count = 0
    for chunk in chunks(values):
        sizes = torch.abs(chunk, out=scratch.like(chunk))
        if chunk.numel() and not float(sizes.max()) <= limit:
            count += int(torch.gt(sizes, limit, out=sizes).sum(dtype=torch.float32))
            chunk.clamp_(-limit, limit)
    return count


def clip_to_(grads: Gradients, context: Context, limit: float | Tensor) -> dict[str, Any] | None:
    """Clip the whole gradient to a limit where triggered; return the report."""
    if not len(grads):
        return None
    if isinstance(limit, Tensor):
        limit = torch.where(limit > 0, limit, torch.inf)
    coefficient = norm_coefficient(grads.global_norm, limit)
    coefficient = where_triggered(read_trigger(context), coefficient, 1.0)
    grads.mul_(coefficient)
    return {"coefficient": coefficient, "limit": limit, "applied": coefficient < 1}


def tensor_report(coefficients: Tensor) -> dict[str, Any]:
    """Return the report of one coefficient for each tensor: the smallest, and the share of tensors clipped."""
    clipped = coefficients < 1
    return {
        "coefficient": coefficients.min(),
        "applied": clipped.any(),
        "clipped_share": clipped.to(wide_dtype(clipped.device)).mean(),
    }
