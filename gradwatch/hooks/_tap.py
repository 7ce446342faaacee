"""Statistics of activations and of the gradients with respect to them, for many modules, on sampled steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._warn import one_line
from ..errors import ConfigError, UnknownNameError, UnknownPathError
from ..stats import moments_in_passing, num_beyond, num_nonfinite
from ..torchside import Aside, are_modes_on, in_transform, member, tensors_of
from ._gradients import hook_gradient
from ._runs import graph_task_id
from ._tap_full import Preflight, register_full_hook
from ._tap_probe import BYSTANDER, BackwardProbe, ForwardProbe, GradProbe, PreForwardProbe
from ._tap_stats import Ledger, Memo, TapStats, measured_extent, measured_moments
from ._tap_units import UnitWindows, is_relu_like, is_saturating, layout_after

__all__ = ["ModuleTap"]

_SATURATED = 5.0
_BACKENDS = ("tensor", "full")


class ModuleTap:
    """Watches outputs, inputs and grad_outputs of modules while it is armed; there is nothing of it on them else, but
    while it rests.

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
        on_output: told, while armed, what each call returned that no call of another module encloses; must hold none of
            it, for it may be the largest tensor of the training.

    Attributes:
        armed: statistics are being gathered.
        forward_order: paths in the order of their first call.
        holders: paths of modules that hold others and have no forward, such as a ModuleList.

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
        on_output: Callable[[Any], None] | None = None,
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
        self.on_output = on_output
        self._depth = 0
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
            if path not in self._aliases and not _is_scripted(module)
        }
        # Those that are not watched still tell whether a call lies within another. Not the root of a LightningModule:
        # its wrappers run the whole `training_step` as its forward.
        rest = [m for m in known.values() if m not in self._hooked and not _is_scripted(m)]
        self._bystanders = [m for m in dict.fromkeys(rest) if m is not model or member(model, "training_step") is None]
        self.holders = frozenset(p for p, m in zip(self.paths, self._modules, strict=True) if not _can_be_called(m))
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
        self._probes: list[Any] = []
        self._can_hang_again = False
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
        self._depth = 0
        if self._handles and all(map(_hangs, self._handles)):  # since `rest`
            for probe in self._probes:
                probe.period = self.period
            self.armed = True
            return
        _remove(self._handles)
        if self._hang_again():
            self.armed = True
            return
        handles: list[Any] = []
        self._probes = []
        try:
            for module, row in self._hooked.items():
                self._register(row, module, handles)
            for module in self._bystanders if self.on_output is not None else ():
                enter, leave = self._probe(PreForwardProbe, BYSTANDER), self._probe(ForwardProbe, BYSTANDER)
                handles.append(enter.hang(module.register_forward_pre_hook, with_kwargs=True))
                handles.append(leave.hang(module.register_forward_hook, with_kwargs=True))
        except BaseException:
            _remove(handles)
            raise
        self._handles = handles
        self.armed = True
        # Which hooks there are depends on nothing that a step may change.
        is_lasting = self._preflight is None and self.on_output is not None
        self._can_hang_again = is_lasting and all(probe.hangs_as_torch_does() for probe in self._probes)

    def _hang_again(self) -> bool:
        """Hang the hooks of the last time where they hung; return whether that could be done with all of them."""
        if not self._can_hang_again:
            return False
        self._can_hang_again = False
        try:
            for probe in self._probes:
                probe.period = self.period
                self._handles.append(probe.handle)
                if not probe.hang_again():
                    break
            else:
                self._can_hang_again = True
        except BaseException:
            _remove(self._handles)
            raise
        if not self._can_hang_again:
            _remove(self._handles)
        return self._can_hang_again

    def _probe(self, kind: Callable[[ModuleTap, int], Any], row: int) -> Any:
        self._probes.append(probe := kind(self, row))
        return probe

    def _register(self, row: int, module: nn.Module, handles: list[Any]) -> None:
        if row not in self._entered or self._needs_verdict(row) or self.on_output is not None:
            enter = self._probe(PreForwardProbe, row)
            handles.append(enter.hang(module.register_forward_pre_hook, with_kwargs=True))
        handles.append(self._probe(ForwardProbe, row).hang(module.register_forward_hook, with_kwargs=True))
        if self._has_full_hook(row):
            handles.extend(register_full_hook(module, BackwardProbe(self, row)))

    def rest(self) -> None:
        """Stop listening until `arm`, which follows soon: hooks on modules stay where they are, and do nothing. To hang
        them anew at every step takes longer than to ask them."""
        if self._preflight is not None:
            self.disarm()  # which hooks come next depends on the verdicts
            return
        self._fall_silent()

    def disarm(self) -> None:
        """Take every hook off, and silence those that graphs still hold. What was gathered stays for `take`."""
        self._fall_silent()
        _remove(self._handles)
        if not self._can_hang_again:
            self._probes = []
        if self._preflight is not None:
            self._preflight.conclude()

    def _fall_silent(self) -> None:
        self.armed = False
        for memo in (self._moments, self._extents, self._counts):
            memo.clear()
        _remove(self._leaf_handles)

    def close(self) -> None:
        """Disarm for ever and forget everything gathered."""
        self.disarm()
        self._probes, self._can_hang_again = [], False
        self._ledger.clear()
        self._windows = UnitWindows()
        self._closed = True

    def take(self, *, apart: bool = False) -> TapStats | None:
        """Return what was gathered since the last time, and begin again; None if nothing was.

        Args:
            apart: what the host knows may stay there (see `TapStats.known`): no other rank is to add to it.
        """
        if self._ledger.empty:
            return None
        for row, silent, units in self._windows.complete():
            self._ledger.add(row, "silent", silent)
            self._ledger.add(row, "units", units)
        return self._ledger.take(self.paths, apart=apart)

    def coverage(self) -> dict[str, str]:
        """Return what is not seen, or not in the way asked for: path -> reason."""
        reasons: dict[str, str] = {}
        for row, (path, module) in enumerate(zip(self.paths, self._modules, strict=True)):
            if path in self._aliases:
                reasons[path] = f"the same module as {self._aliases[path]!r}, and counted there"
            elif row in self._failures:
                reasons[path] = self._failures[row]
            elif row not in self._entered and path not in self.holders:
                reasons[path] = self._why_not_entered(path, module)
            elif self._preflight is not None and (why := self._preflight.verdicts.get(row)):
                reasons[path] = f"gradient from a tensor hook, not a full one: {why}"
        return reasons

    def _why_not_entered(self, path: str, module: nn.Module) -> str:
        if _is_scripted(module):
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
        if graph_task_id() == -1:
            self._depth += 1
        if row == BYSTANDER:
            return
        if row not in self._entered:
            self._entered.add(row)
            self.forward_order.append(self.paths[row])
        if self._preflight is not None and self._needs_verdict(row):
            try:
                with Aside():
                    self._preflight.on_enter(row, args, kwargs)
            except Exception as error:
                self._fail(row, "input", error)

    def on_forward(self, row: int, args: Any, kwargs: Any, output: Any) -> None:
        """Called after a module's forward."""
        if self.gate is not None and not self.gate():
            return
        is_recording = torch.is_grad_enabled()
        # Inside backward activation checkpointing runs a forward again: it was counted.
        counts = graph_task_id() == -1
        with Aside():
            if row != BYSTANDER:
                self._look(row, args, kwargs, output, counts=counts, places=is_recording)
            if counts:
                self._depth = max(self._depth - 1, 0)
                if self._depth == 0 and self.on_output is not None and not in_transform():
                    self.on_output(output)

    def _look(self, row: int, args: Any, kwargs: Any, output: Any, *, counts: bool, places: bool) -> None:
        if in_transform():
            self._failures.setdefault(row, "not seen: it is called inside a torch.func transform")
            return
        try:
            inputs, outputs = _distinct([args, kwargs] if kwargs else args), _distinct(output)
            full = self._preflight is not None and self._has_full_hook(row)
            for tensor in outputs:
                if places and tensor.requires_grad and not full:
                    handle = hook_gradient(tensor, GradProbe(self, row), inputs, self._modules[row], any_shape=True)
                    if tensor.is_leaf:
                        self._leaf_handles.append(handle)
            if self._preflight is not None and self._needs_verdict(row):
                self._preflight.on_forward(row, output)
            if counts:
                self._measure(row, inputs, outputs)
        except Exception as error:
            self._fail(row, "output", error)

    def on_grad(self, row: int, grad: Tensor) -> None:
        """Called in backward with the gradient with respect to an output of the module."""
        if self.gate is not None and not self.gate():
            return
        if in_transform():
            return
        try:
            # Of a plain tensor on the host it takes no operation of torch's, which others would see.
            if are_modes_on() or not self._measure_grad_in_passing(row, grad):
                with Aside():
                    self._measure_grad(row, grad)
            if self._preflight is not None:
                self._preflight.on_grad(row)
        except Exception as error:
            self._fail(row, "grad_output", error)

    def _measure_grad_in_passing(self, row: int, grad: Tensor) -> bool:
        found = self._extents.find(grad)
        if found is None:
            moments = moments_in_passing(grad)
            if moments is None:
                return False
            found = (grad.numel(), (moments[1], moments[3], moments[4]))
            self._extents.keep(grad, found)
        self._ledger.add_grad(row, *found)
        return True

    def _measure_grad(self, row: int, grad: Tensor) -> None:
        found = self._extents.find(grad)
        if found is None:
            tensor = _local(grad)
            found = (_numel(tensor), measured_extent(tensor))
            self._extents.keep(grad, found)
        self._ledger.add_grad(row, *found)

    def _measure(self, row: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._layout = self._layouts[row] or self._layout
        for tensor in outputs:
            self._measure_output(row, tensor)
        for tensor in inputs:
            self._measure_input(row, tensor)

    def _measure_output(self, row: int, tensor: Tensor) -> None:
        """Measure one tensor: what can't be leaves the others alone."""
        try:
            found = self._moments.find(tensor)
            if found is None:
                moments = moments_in_passing(tensor)
                if moments is not None:
                    found = (tensor.numel(), moments)
                else:
                    local = _local(tensor)
                    found = (_numel(local), measured_moments(local))
                self._moments.keep(tensor, found)
            self._ledger.add_output(row, *found)
            if self._relu_like[row]:
                self._windows.see(row, _local(tensor).detach(), self._layout)
        except Exception as error:
            self._fail(row, "output", error)

    def _measure_input(self, row: int, tensor: Tensor) -> None:
        """Measure one tensor, likewise."""
        try:
            known = self._moments.find(tensor)
            found = (known[0], known[1][3]) if known else self._counts.find(tensor)
            if found is None:
                local = _local(tensor)
                found = (_numel(local), num_nonfinite(local))
                self._counts.keep(tensor, found)
            self._ledger.add_input(row, *found)
            if self._saturating[row]:
                self._ledger.add(row, "saturated", num_beyond(_local(tensor), _SATURATED))
                self._ledger.add(row, "saturated_numel", found[0])
        except Exception as error:
            self._fail(row, "input", error)

    def _fail(self, row: int, port: str, error: Exception) -> None:
        self._failures.setdefault(row, f"{port} could not be measured: {one_line(error)}")


def _can_be_called(module: nn.Module) -> bool:
    """Return False for what only holds others, such as a ModuleList: it has no forward."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def _distinct(tree: Any) -> list[Tensor]:
    """Return the floating tensors of a tree, each once."""
    if type(tree) is tuple and len(tree) == 1:
        tree = tree[0]
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() or tree.is_complex() else []
    found = {id(t): t for _, t in tensors_of(tree) if t.is_floating_point() or t.is_complex()}
    return list(found.values())


def _local(tensor: Any) -> Tensor:
    """Return this rank's part. No collective may run in a hook: ranks need not all come by."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or not isinstance(tensor, dtensor.DTensor):
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a distributed tensor with pending sums")
    return tensor.to_local()


def _numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _hangs(handle: Any) -> bool:
    """Return whether a hook is still where it was put: others may have cleared the module's hooks."""
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def _remove(handles: list[Any]) -> None:
    while handles:
        handles[-1].remove()
        handles.pop()


def _is_compiled(module: nn.Module) -> bool:
    return any(member(module, name) is not None for name in ("_compiled_call_impl", "_orig_mod"))
