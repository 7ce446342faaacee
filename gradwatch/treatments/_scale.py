"""Multiplying gradients by a constant, or to a given norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._warn import warn
from ..protocols import Context
from ..stats import tensor_norms
from ..torchside import wide_dtype
from ._base import BaseTreatment, chosen, read_trigger, where_triggered
from ._checks import check_choice, check_number, check_patterns
from ._grad_output import GradOutputHandle, at_grad_output
from ._tensors import scale_

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["Normalize", "Scale", "is_scale_free", "normalize_", "scale_"]

# Their update divides the gradient by its own running size, or takes its sign: a constant factor cancels.
_SCALE_FREE = frozenset(
    {
        *("Adam", "AdamW", "Adam8bit", "AdamW8bit", "Adamax", "NAdam", "RAdam", "SparseAdam", "FusedAdam"),
        *("Adafactor", "Adagrad", "RMSprop", "Rprop", "Lion", "Lamb", "Muon", "Sophia", "SignSGD"),
    }
)


@torch.no_grad()
def normalize_(grads: Sequence[Tensor], norm: float | Tensor = 1.0) -> Tensor:
    """Scale each gradient on its own to the given norm; return the norms before. Zero and non-finite ones stay."""
    before = tensor_norms(grads)
    scale_(grads, _to_norm(before, norm))
    return before


def is_scale_free(optimizer: Any) -> bool:
    """Return whether a constant factor on the gradients leaves the optimizer's steps nearly as they are."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return any(cls.__name__ in _SCALE_FREE for cls in type(optimizer).__mro__)


@dataclass(frozen=True, eq=False)
class Scale(BaseTreatment):
    """Multiply gradients, or error signals inside backward, by a constant.

    Under Adam and its kin a constant factor at every step cancels out of the update (x100 or x0.01 ends within 5e-6 of
    the same weights): a warning says so, once.

    Args:
        factor: to multiply by.
        paths: glob patterns of parameters, or of modules with `at="grad_output"`.
        at: `"grad"`, before the optimizer step; `"grad_output"`, inside backward: the module's own weight gradients
            and everything upstream change with it. Nested modules multiply: name one level.
    """

    factor: float
    paths: str | Sequence[str] = "*"
    at: Literal["grad", "grad_output"] = field(default="grad", kw_only=True)
    _memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    order: ClassVar[int] = 20

    def __post_init__(self) -> None:
        check_number(self, "factor", self.factor, above=0, below=float("inf"))
        check_patterns(self, "paths", self.paths)
        check_choice(self, "at", self.at, ("grad", "grad_output"))

    def install(self, model: nn.Module) -> GradOutputHandle | None:
        """Scale error signals of the model's modules inside backward, until the handle is removed."""
        if self.at != "grad_output":
            return None
        handle = at_grad_output(model, self.paths, lambda grad, _: (grad * self.factor, self.factor))
        self._memory["handle"] = handle
        return handle

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        if self.at == "grad_output":
            handle = self._memory.get("handle")
            return None if handle is None else handle.take_report()
        self._warn_where_it_cancels(context)
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        ones = torch.ones((), dtype=wide_dtype(part.device), device=part.device)
        coefficient = where_triggered(read_trigger(context), ones * self.factor, 1.0)
        part.mul_(coefficient)
        return {"coefficient": coefficient, "applied": coefficient != 1}

    def _warn_where_it_cancels(self, context: Context) -> None:
        # Behind a rule the factor is not constant over steps, and does not cancel.
        if context.rule or self._memory.get("warned"):
            return
        names = sorted({type(o).__name__ for o in context.optimizers if is_scale_free(o)})
        if names:
            self._memory["warned"] = True
            warn(
                f"Scale({self.factor:g}): {names[0]} divides each gradient by its own running size, so a constant "
                "factor cancels and changes next to nothing. To train some parameters faster or slower give them a "
                "learning rate of their own.",
                stacklevel=2,
            )


@dataclass(frozen=True, eq=False)
class Normalize(BaseTreatment):
    """Scale gradients to a given norm, whatever theirs is: only the direction counts.

    Hazan et al., "Beyond convexity: stochastic quasi-convex optimization", NeurIPS 2015, arXiv 1507.02030 (whole
    gradient); You et al., arXiv 1708.03888, for the norm of each tensor. Zero gradients stay zero; what is not finite
    stays as it is.

    Args:
        norm: to scale to.
        by: `"global"`, the whole gradient as one vector; `"tensor"`, each parameter's on its own.
        paths: glob patterns of parameters.
    """

    norm: float = 1.0
    by: Literal["global", "tensor"] = field(default="global", kw_only=True)
    paths: str | Sequence[str] = field(default="*", kw_only=True)
    order: ClassVar[int] = 45

    def __post_init__(self) -> None:
        check_number(self, "norm", self.norm, above=0, below=float("inf"))
        check_choice(self, "by", self.by, ("global", "tensor"))
        check_patterns(self, "paths", self.paths)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        part = chosen(grads, self.paths)
        if not len(part):
            return None
        whole = part.global_norm
        coefficients = _to_norm(whole if self.by == "global" else part.norms, self.norm)
        coefficients = torch.where(torch.isfinite(whole), coefficients, 1.0)
        coefficients = where_triggered(read_trigger(context), coefficients, 1.0)
        part.mul_(coefficients)
        return {"coefficient": coefficients.min(), "applied": (coefficients != 1).any(), "limit": self.norm}


def _to_norm(norms: Tensor, norm: float | Tensor) -> Tensor:
    return torch.where(torch.isfinite(norms) & (norms > 0), norm / norms, 1.0)
