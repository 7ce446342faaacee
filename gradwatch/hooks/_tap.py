"""Statistics of activations and of the gradients with respect to them, for many modules, on sampled steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnknownNameError, UnknownPathError
from ..stats import flat_local, is_readable, num_beyond, num_nonfinite
from ._gradients import hook_gradient
from ._pytree import tensors_of
from ._runs import graph_task_id
from ._tap_full import Preflight, register_full_hook
from ._tap_probe import BackwardProbe, ForwardProbe, GradProbe, PreForwardProbe
from ._tap_stats import Ledger, Memo, TapStats, measured_extent, measured_moments
from ._tap_units import UnitWindows, is_relu_like, is_saturating, layout_after

__all__ = ["ModuleTap"]

_SATURATED = 5.0
_BACKENDS = ("tensor", "full")


class ModuleTap:
    """Watches outputs, inputs and grad_outputs of modules while it is armed; there is nothing of it on them else.

    Between `arm` and `take` all calls of a module, over all micro-batches, add up. A forward that activation
    checkpointing repeats counts once. Nothing is read back from the device, nothing is changed: training with a tap of
    backend "tensor" is bitwise equal to training without. A statistic that fails (a tensor of an unknown kind) is left
    out and named by `coverage`; it never stops the training.

    Args:
        model: the modules' owner.
        paths: of the modules, as in `model.named_modules()`; `""` is the root, left out unless it is named.
        backend: `"tensor"`: gradients from tensor hooks placed on outputs in forward. `"full"`: torch's full backward
            hooks, from the second time a module is seen on, and only where the first showed that they would neither
            raise (in-place changes) nor stay silent. Full hooks may change the last bits of gradients where a tensor
            is used several times (attention on q, k, v of one tensor).
        gate: asked at every call; while it says False nothing is taken (validation, probes of single tasks).

    Attributes:
        armed: statistics are being gathered.
        forward_order: paths in the order of their first call.
        last_output: the last floating tensor of two or more dimensions that a module returned, without its graph; it is
            the owner's to take.

    Raises:
        UnknownPathError: the model has no module at one of the paths.
        UnknownNameError: `backend` is neither of the two.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        *,
        backend: str = "tensor",
        gate: Callable[[], bool] | None = None,
    ) -> None:
        if backend not in _BACKENDS:
            raise UnknownNameError("backend", backend, _BACKENDS, where="ModuleTap")
        known = dict(model.named_modules(remove_duplicate=False))
        for path in paths:
            if path not in known:
                raise UnknownPathError(path, known, model_name=type(model).__name__, kind="module")
        self.backend = backend
        self.gate = gate
        self.paths = tuple(dict.fromkeys(paths))
        self.armed = False
        self.period = 0
        self.forward_order: list[str] = []
        self.last_output: Tensor | None = None
        self._aliases: dict[str, str] = {}
        first_path: dict[nn.Module, str] = {}
        for path in self.paths:
            if first_path.setdefault(known[path], path) != path:
                self._aliases[path] = first_path[known[path]]
        self._modules = [known[path] for path in self.paths]
        # Of a module with several paths the first counts; scripted ones take no hooks.
        self._hooked = {
            module: row
            for row, (path, module) in enumerate(zip(self.paths, self._modules, strict=True))
            if path not in self._aliases and not isinstance(module, torch.jit.ScriptModule)
        }
        self._compiled = [path for path, module in known.items() if _is_compiled(module)]
        self._layouts = [layout_after(module) for module in self._modules]
        self._relu_like = [is_relu_like(module) for module in self._modules]
        self._saturating = [is_saturating(module) for module in self._modules]
        self._layout: str | None = None
        self._ledger = Ledger(len(self.paths))
        self._moments, self._extents, self._counts = Memo(), Memo(), Memo()
        self._windows = UnitWindows()
        self._preflight = Preflight(len(self.paths)) if backend == "full" else None
        self._handles: list[Any] = []
        self._leaf_handles: list[Any] = []
        self._entered: set[int] = set()
        self._failures: dict[int, str] = {}
        self._closed = False

    def arm(self) -> None:
        """Register the hooks: on all modules, or on none if one registration fails. Nothing happens when armed.

        Raises:
            ConfigError: the tap was closed.
        """
        if self._closed:
            raise ConfigError("this ModuleTap was closed: make a new one.")
        if self.armed:
            return
        self.period += 1
        handles: list[Any] = []
        try:
            for module, row in self._hooked.items():
                self._register(row, module, handles)
        except BaseException:
            _remove(handles)
            raise
        self._handles = handles
        self.armed = True

    def _register(self, row: int, module: nn.Module, handles: list[Any]) -> None:
        if row not in self._entered or self._needs_verdict(row):
            handles.append(module.register_forward_pre_hook(PreForwardProbe(self, row), with_kwargs=True))
        handles.append(module.register_forward_hook(ForwardProbe(self, row), with_kwargs=True))
        if self._has_full_hook(row):
            handles.extend(register_full_hook(module, BackwardProbe(self, row)))

    def listens_to(self, module: nn.Module) -> bool:
        """Return whether this module's calls are seen while the tap is armed."""
        return module in self._hooked

    def disarm(self) -> None:
        """Take every hook off, and silence those that graphs still hold. What was gathered stays for `take`."""
        self.armed = False
        for memo in (self._moments, self._extents, self._counts):
            memo.clear()
        _remove(self._handles)
        _remove(self._leaf_handles)
        if self._preflight is not None:
            self._preflight.conclude()

    def close(self) -> None:
        """Disarm for ever and forget everything gathered."""
        self.disarm()
        self.last_output = None
        self._ledger.clear()
        self._windows = UnitWindows()
        self._closed = True

    def take(self) -> TapStats | None:
        """Return what was gathered since the last time, and begin again; None if nothing was."""
        if self._ledger.empty:
            return None
        for row, silent, units in self._windows.complete():
            self._ledger.add(row, "silent", silent)
            self._ledger.add(row, "units", units)
        return self._ledger.take(self.paths)

    def coverage(self) -> dict[str, str]:
        """Return what is not seen, or not in the way asked for: path -> reason."""
        reasons: dict[str, str] = {}
        for row, (path, module) in enumerate(zip(self.paths, self._modules, strict=True)):
            if path in self._aliases:
                reasons[path] = f"the same module as {self._aliases[path]!r}, and counted there"
            elif row in self._failures:
                reasons[path] = self._failures[row]
            elif row not in self._entered:
                reasons[path] = self._why_not_entered(path, module)
            elif self._preflight is not None and (why := self._preflight.verdicts.get(row)):
                reasons[path] = f"gradient from a tensor hook, not a full one: {why}"
        return reasons

    def _why_not_entered(self, path: str, module: nn.Module) -> str:
        if isinstance(module, torch.jit.ScriptModule):
            return "not seen: a scripted module"
        if any(path == c or path.startswith(c + ".") or not c for c in self._compiled):
            return "not seen: inside a compiled module"
        return "not called while it was watched"

    def _has_full_hook(self, row: int) -> bool:
        return self._preflight is not None and self._preflight.verdicts.get(row) == ""

    def _needs_verdict(self, row: int) -> bool:
        return self._preflight is not None and row not in self._preflight.verdicts

    def on_enter(self, row: int, args: Any, kwargs: Any) -> None:
        """Called before a module's forward."""
        if self.gate is not None and not self.gate():
            return
        if row not in self._entered:
            self._entered.add(row)
            self.forward_order.append(self.paths[row])
        if self._preflight is not None and self._needs_verdict(row):
            self._preflight.on_enter(row, args, kwargs)

    def on_forward(self, row: int, args: Any, kwargs: Any, output: Any) -> None:
        """Called after a module's forward."""
        if self.gate is not None and not self.gate():
            return
        try:
            inputs, outputs = _inputs(args, kwargs), _distinct(output)
            full = self._preflight is not None and self._has_full_hook(row)
            for tensor in outputs:
                if tensor.requires_grad and not full:
                    handle = hook_gradient(tensor, GradProbe(self, row), inputs, self._modules[row], any_shape=True)
                    if tensor.is_leaf:
                        self._leaf_handles.append(handle)
            if self._preflight is not None and self._needs_verdict(row):
                self._preflight.on_forward(row, output)
            # Inside backward activation checkpointing runs a forward again: it was counted.
            if graph_task_id() == -1:
                self._measure(row, inputs, outputs)
                if outputs and outputs[0] is output and output.ndim >= 2 and output.is_floating_point():
                    self.last_output = output.detach()
        except Exception as error:
            self._fail(row, "output", error)

    def on_grad(self, row: int, grad: Tensor) -> None:
        """Called in backward with the gradient with respect to an output of the module."""
        if self.gate is not None and not self.gate():
            return
        try:
            found = self._extents.find(grad)
            if found is None:
                piece = _piece(grad)
                found = (piece.numel(), measured_extent(piece))
                self._extents.keep(grad, found)
            self._ledger.add_grad(row, *found)
            if self._preflight is not None:
                self._preflight.on_grad(row)
        except Exception as error:
            self._fail(row, "grad_output", error)

    def _measure(self, row: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._layout = self._layouts[row] or self._layout
        for tensor in outputs:
            found = self._moments.find(tensor)
            if found is None:
                piece = _piece(tensor)
                found = (piece.numel(), measured_moments(piece))
                self._moments.keep(tensor, found)
            self._ledger.add_output(row, *found)
            if self._relu_like[row]:
                self._windows.see(row, _local(tensor).detach(), self._layout)
        for tensor in inputs:
            known = self._moments.find(tensor)
            found = (known[0], known[1][3]) if known else self._counts.find(tensor)
            if found is None:
                piece = _piece(tensor)
                found = (piece.numel(), num_nonfinite(piece))
                self._counts.keep(tensor, found)
            self._ledger.add_input(row, *found)
            if self._saturating[row]:
                self._ledger.add(row, "saturated", num_beyond(_piece(tensor).detach(), _SATURATED))
                self._ledger.add(row, "saturated_numel", found[0])

    def _fail(self, row: int, port: str, error: Exception) -> None:
        self._failures.setdefault(row, f"{port} could not be measured: {type(error).__name__}: {error}")


def _distinct(tree: Any) -> list[Tensor]:
    """Return the floating tensors of a tree, each once."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() or tree.is_complex() else []
    found = {id(t): t for _, t in tensors_of(tree) if t.is_floating_point() or t.is_complex()}
    return list(found.values())


def _inputs(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the floating tensors among arguments, each once."""
    return _distinct(args[0] if len(args) == 1 and not kwargs else [args, kwargs])


def _local(tensor: Any) -> Tensor:
    """Return this rank's part. No collective may run in a hook: ranks need not all come by."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(tensor, dtensor.DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a distributed tensor with pending sums")
    return tensor.to_local()


def _piece(tensor: Tensor) -> Tensor:
    """Return a tensor's elements for measuring; for a kernel that looks at memory alone, the tensor itself."""
    return tensor if is_readable(tensor) else flat_local(_local(tensor).detach())


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
