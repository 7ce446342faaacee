"""What all treatments share: a name, a place in the order, and how a rule's trigger reaches the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnknownPathError
from ..protocols import Context, Treatment
from ..records import select_paths
from ..torchside import Pipeline, clean_path, is_host, moved, parameters_of

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["BaseTreatment", "chosen", "read_trigger", "sort_treatments", "where_triggered"]

T = TypeVar("T")


class BaseTreatment(Treatment):
    """A treatment that looks at the parameters that `paths` name; see `gradwatch.protocols.Treatment` for the rest.

    Those here are frozen dataclasses: settings as fields, checked in `__post_init__`; memory, where there is any, in
    fields that are neither shown nor given.

    Attributes:
        paths: glob patterns that must match something in the model.
        at: what is changed: `"grad"`, gradients of parameters before the optimizer step, or `"grad_output"`, error
            signals of modules inside backward (then `install` puts the hooks on a model).
    """

    at: str = "grad"
    paths: str | Sequence[str] = "*"

    def bind(self, model: nn.Module) -> None:
        """Look at the model once, before the first step.

        Raises:
            UnknownPathError: `paths` matches none of the model's parameters (modules, for `at="grad_output"`).
        """
        known: Sequence[str]
        if isinstance(model, Pipeline):
            known = model.module_paths if self.at == "grad_output" else model.parameter_paths
        elif self.at == "grad_output":
            known = [clean_path(path) for path, _ in model.named_modules()]
        else:
            known = [owned.path for owned in parameters_of(model)]
        if not select_paths(known, self.paths).any():
            kind = "module" if self.at == "grad_output" else "parameter"
            raise UnknownPathError(_shown(self.paths), known, model_name=type(model).__name__, kind=kind)


def sort_treatments(treatments: Iterable[T], *, of: Callable[[T], Any] = lambda treatment: treatment) -> list[T]:
    """Return treatments in the order in which one step applies them; those of one place keep theirs.

    Guards first, then what scales, then what clips units and tensors, then what clips the whole gradient, then noise.

    Args:
        of: the treatment of an item, where these are no treatments themselves.
    """
    return sorted(treatments, key=lambda item: of(item).order)


def chosen(grads: Gradients, paths: str | Sequence[str]) -> Gradients:
    """Return the gradients whose path matches, none where no such parameter has one at this step."""
    return grads if paths == "*" else grads.select(paths)


def read_trigger(context: Context) -> bool | Tensor:
    """Return the trigger as a bool where reading it is free, else the 0-dim bool tensor on the device."""
    trigger = context.trigger
    if isinstance(trigger, Tensor):
        return bool(trigger) if context.can_read or is_host(trigger.device) else trigger
    return bool(trigger)


def where_triggered(trigger: bool | Tensor, value: Tensor, otherwise: float) -> Tensor:
    """Return `value` where triggered, else `otherwise`, without reading the device."""
    if isinstance(trigger, Tensor):
        return torch.where(moved(trigger, value.device), value, otherwise)
    return value if trigger else torch.full_like(value, otherwise)


def _shown(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)
