"""Where torch's full backward hooks may go: found out by watching one pass, before any is registered.

A full hook makes the inputs and outputs of its module views of a custom function, so that a later in-place operation
on them raises in forward; on outputs that are not tensors or flat tuples it never fires; where no input needs a
gradient it warns. None of this can be seen in the module, all of it in one pass through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torchside import tensors_of

__all__ = ["Preflight", "register_full_hook"]


class Preflight:
    """Watches the first pass through each module and says why it can't have a full backward hook.

    Args:
        rows: number of modules.
    """

    def __init__(self, rows: int) -> None:
        self._marks: list[list[tuple[Tensor, int]]] = [[] for _ in range(rows)]
        self._reasons: dict[int, str] = {}
        self._fired: set[int] = set()
        self.verdicts: dict[int, str] = {}

    def on_enter(self, row: int, args: Any, kwargs: Any) -> None:
        self._see(row, [tensor for _, tensor in tensors_of([args, kwargs])])
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self._reasons.setdefault(row, "no positional input needs a gradient")

    def on_forward(self, row: int, output: Any) -> None:
        tensors = [tensor for _, tensor in tensors_of(output)]
        self._see(row, tensors)
        top = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, tuple) else []
        if any(tensor.requires_grad and not any(tensor is t for t in top) for tensor in tensors):
            kind = type(output).__name__
            self._reasons.setdefault(row, f"its output ({kind}) holds tensors that full hooks do not reach")

    def _see(self, row: int, tensors: list[Tensor]) -> None:
        plain = [tensor for tensor in tensors if _has_views(tensor)]
        if len(plain) < len(tensors):
            # Torch would ask them for a view in the user's forward, which then raises.
            self._reasons.setdefault(row, "an input or output of it is no plain tensor")
        self._marks[row].extend(_mark(tensor) for tensor in plain)

    def on_grad(self, row: int) -> None:
        self._fired.add(row)

    def conclude(self) -> None:
        """Give a verdict on each module whose gradient was seen: "" for a full hook, else the reason against it."""
        for row in self._fired - self.verdicts.keys():
            if any(tensor._version != version for tensor, version in self._marks[row]):
                self._reasons[row] = "an input or output of it is changed in place"
            self.verdicts[row] = self._reasons.get(row, "")
        self._marks = [[] for _ in self._marks]
        self._fired.clear()


def _has_views(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def _mark(tensor: Tensor) -> tuple[Tensor, int]:
    """Return something that shares the tensor's version counter, but neither its memory nor its graph."""
    if tensor.is_inference():
        return torch.empty(0), 0
    with torch.no_grad():
        alias = tensor.detach()
        alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias, alias._version


def register_full_hook(module: nn.Module, probe: Any) -> list[Any]:
    """Register a full backward hook; removing what is returned, last first, leaves the module as it was.

    Torch leaves a mark on the module that makes the other kind of backward hook impossible for ever after.
    """
    before = module._is_full_backward_hook
    handle = probe.hang(module.register_full_backward_hook)
    return [_Restore(module, before), handle]


class _Restore:
    def __init__(self, module: nn.Module, before: bool | None) -> None:
        self._module = module
        self._before = before

    def remove(self) -> None:
        if not self._module._backward_hooks and not self._module._backward_pre_hooks:
            self._module._is_full_backward_hook = self._before
