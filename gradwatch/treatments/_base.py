"""What all treatments share: a name, a place in the order, and how a rule's trigger reaches the arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnknownPathError
from ..protocols import Context
from ..records import select_paths

if TYPE_CHECKING:
    from ..stats import Gradients

__all__ = ["BaseTreatment", "chosen", "clean_path", "read_trigger", "sort_treatments", "where_triggered"]

T = TypeVar("T")
# Names that wrappers put into the paths of parameters: curves and patterns keep the model's own.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class BaseTreatment:
    """A treatment without memory: settings only.

    Subclasses are frozen dataclasses: settings as fields, checked in `__post_init__`; memory, where there is any, in
    fields that are neither shown nor given.

    Attributes:
        order: place among the treatments of one step, small first: guards (10), scale (20), centralize (30), clips of
            units and tensors (40), clips of the whole gradient (50), noise (60).
        at: what is changed: `"grad"`, gradients of parameters before the optimizer step, or `"grad_output"`, error
            signals of modules inside backward (then `install` puts the hooks on a model).
        learns: keeps statistics of the steps it sees: behind a rule it wants to be applied at every step, with a False
            trigger where the rule did not fire.
        needs_host: works only where its trigger can be read: the engine must wait for the rule's verdict.
    """

    order: ClassVar[int] = 50
    learns: ClassVar[bool] = False
    needs_host: ClassVar[bool] = False
    at: str = "grad"
    paths: str | Sequence[str] = "*"

    @property
    def name(self) -> str:
        """Class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def bind(self, model: nn.Module) -> None:
        """Look at the model once, before the first step.

        Raises:
            UnknownPathError: `paths` matches none of the model's parameters (modules, for `at="grad_output"`).
        """
        named = model.named_modules() if self.at == "grad_output" else model.named_parameters()
        known = [clean_path(path) for path, _ in named]
        if not select_paths(known, self.paths).any():
            kind = "module" if self.at == "grad_output" else "parameter"
            raise UnknownPathError(_shown(self.paths), known, model_name=type(model).__name__, kind=kind)

    def apply_(self, grads: Gradients, context: Context) -> Mapping[str, Any] | None:
        """Change the gradients in place; return what to report."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain values and tensors on the CPU; {} where there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the memory of another of the same settings."""


def sort_treatments(treatments: Iterable[T]) -> list[T]:
    """Return the treatments in the order in which one step applies them; those of one place keep theirs.

    Guards first, then what scales, then what clips units and tensors, then what clips the whole gradient, then noise.
    Objects without an `order` count as clips of the whole gradient.
    """
    return sorted(treatments, key=lambda treatment: getattr(treatment, "order", BaseTreatment.order))


def chosen(grads: Gradients, paths: str | Sequence[str]) -> Gradients:
    """Return the gradients whose path matches, none where no such parameter has one at this step."""
    return grads if paths == "*" else grads.select(paths)


def read_trigger(context: Context) -> bool | Tensor:
    """Return the trigger as a bool where reading it is free, else the 0-dim bool tensor on the device."""
    trigger = context.trigger
    if isinstance(trigger, Tensor):
        return bool(trigger) if context.can_read or trigger.device.type == "cpu" else trigger
    return bool(trigger)


def where_triggered(trigger: bool | Tensor, value: Tensor, otherwise: float) -> Tensor:
    """Return `value` where triggered, else `otherwise`, without reading the device."""
    if isinstance(trigger, Tensor):
        return torch.where(trigger.to(value.device), value, otherwise)
    return value if trigger else torch.full_like(value, otherwise)


def clean_path(path: str) -> str:
    """Return the path without the names that wrappers (compile, FSDP, checkpointing) put in."""
    return _WRAPPERS.sub("", path)


def _shown(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else ", ".join(patterns)
