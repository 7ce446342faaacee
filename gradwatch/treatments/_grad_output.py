"""Changing error signals inside backward, through hooks on the outputs of modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnknownPathError
from ..records import select_paths
from ..torchside import Pipeline, WeakHook, clean_path, home, moved, tensors_of, wide_dtype

__all__ = ["GradOutputHandle", "GradOutputKernel", "at_grad_output"]

GradOutputKernel = Callable[[Tensor, float], "tuple[Tensor, Tensor | float]"]
"""From an error signal and the loss scale in it to the changed signal and the coefficient: a pure function."""


class GradOutputHandle:
    """The hooks that `at_grad_output` put on a model. Idle, they cost a branch.

    Attributes:
        enabled: False leaves every signal as it is; also for graphs that exist already.
        grad_scale: what the loss is multiplied by before backward (a GradScaler's scale), so that absolute limits
            hold for unscaled signals.
        paths: of the modules.
    """

    def __init__(self, kernel: GradOutputKernel, paths: Sequence[str]) -> None:
        self.enabled = True
        self.grad_scale = 1.0
        self.paths = tuple(paths)
        self._kernel = kernel
        self._hooks: list[RemovableHandle] = []
        self._coefficients: list[Tensor] = []
        # By identity: the tensor, and how often it was written to when it got its hook.
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def remove(self) -> None:
        """Take the hooks off; those of graphs that exist already become idle. May be called again."""
        self.enabled = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._coefficients.clear()
        self._seen.clear()

    def take_report(self) -> dict[str, Any]:
        """Return what happened since the last call (smallest coefficient, share of signals changed) and forget it."""
        if not self._coefficients:
            return {"applied": 0.0, "signals": 0.0}
        device = home(self._coefficients)
        coefficients = torch.stack([moved(c, device) for c in self._coefficients])
        self._coefficients.clear()
        changed = coefficients != 1
        share = changed.to(wide_dtype(device)).mean()
        return {
            "coefficient": coefficients.min(),
            "applied": changed.any(),
            "clipped_share": share,
            "signals": float(len(coefficients)),
        }

    def on_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called after the forward of a module."""
        self.watch(output)

    def watch(self, output: Any) -> None:
        """Put a hook on every tensor of a module's output that will get a gradient."""
        if not self.enabled or not torch.is_grad_enabled():
            return
        for _, tensor in tensors_of(output):
            if not tensor.requires_grad or self._is_watched(tensor):
                continue
            # The hook must not hold the output: a graph that holds itself is never freed.
            tensor.register_hook(_change_with(weakref.ref(self)))

    def change(self, grad: Tensor) -> Tensor | None:
        """Return the changed error signal; None leaves it."""
        if not self.enabled:
            return None
        with torch.no_grad():
            changed, coefficient = self._kernel(grad, self.grad_scale)
            wide = wide_dtype(grad.device)
            if not isinstance(coefficient, Tensor):
                coefficient = torch.full((), coefficient, dtype=wide, device=grad.device)
            self._coefficients.append(coefficient.detach().to(wide))
            # Nobody may ask for the report: what is kept stays small.
            if len(self._coefficients) >= 4096:
                device = home(self._coefficients)
                self._coefficients[:] = [torch.stack([moved(c, device) for c in self._coefficients]).min()]
        return changed

    def _is_watched(self, tensor: Tensor) -> bool:
        """Whether the tensor has our hook: a container often returns its last child's output.

        Written to in place since (an in-place ReLU returns its input), it stands for another value with another signal.
        """
        key, seen = id(tensor), self._seen
        known = seen.get(key)
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return True
        seen[key] = (weakref.ref(tensor, lambda _, key=key: seen.pop(key, None)), tensor._version)  # type: ignore[misc]
        return False


def at_grad_output(model: nn.Module, patterns: str | Sequence[str], kernel: GradOutputKernel) -> GradOutputHandle:
    """Change the error signals of modules inside backward; return the handle that takes the hooks off.

    The signal is the gradient of the loss with respect to a module's output. Changing it changes the module's own
    weight gradients and everything upstream. It is caught by tensor hooks on the outputs, which (unlike torch's full
    backward hooks) leave in-place operations after the module alone; where several consumers use the output it is
    their total. Copies and pickles of the model are free of it.

    Args:
        model: whose modules.
        patterns: globs over `named_modules()`; `*` crosses dots. The root matches `""` alone.
        kernel: from signal and loss scale to changed signal and coefficient; it must not change its argument in place.

    Raises:
        UnknownPathError: no module matches.
    """
    modules = {clean_path(path): module for path, module in model.named_modules()}
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = list(modules)
    paths = [p for p, is_chosen in zip(names, select_paths(names, patterns), strict=True) if is_chosen]
    if "" not in patterns:
        paths = [path for path in paths if path]
    if not paths and not isinstance(model, Pipeline):
        raise UnknownPathError(", ".join(patterns), names, model_name=type(model).__name__, kind="module")
    handle = GradOutputHandle(kernel, paths)
    for path in paths:
        # Kept: who wants the change for good may drop the handle.
        handle._hooks.append(WeakHook.of(handle.on_forward, keeps_owner=True).hang(modules[path].register_forward_hook))
    return handle


def _change_with(reference: weakref.ref[GradOutputHandle]) -> Callable[[Tensor], Tensor | None]:
    def change(grad: Tensor) -> Tensor | None:
        handle = reference()
        return None if handle is None else handle.change(grad)

    return change
