"""A model that trains on copies: its modules hold them for a while, and then what they held before, object for object.

Nothing of the user's is written to: parameters, buffers and what modules keep in plain containers are copied into new
dictionaries of attributes, which the modules get instead of their own. Whoever holds a module (a closure, a trainer)
finds the copies there. Afterwards the modules get their own dictionaries back: values, gradients, version counters,
hooks and modes never were anything else.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._closing import insist
from ..torchside import is_flat_sharded, is_owned, is_split_by_zero, size_of

__all__ = ["MODES", "Stage", "bytes_of", "copy_of", "modules_of", "on_stage", "why_not_copied"]

MODES = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules that do something else in train mode than in eval mode."""
_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set, deque)
_HOOKS = frozenset(
    f"_optimizer_{of}_{when}_hooks" for of in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


class Stage:
    """Copies that stand in a training's place.

    Attributes:
        modules: whose attributes are copies.
        optimizers: copies of the optimizers, over the copied parameters; without hooks and without schedulers.
        copies: id of a tensor of the user's -> its copy.
        training: the mode that every module is kept in, whatever asks for another; None: as asked.
    """

    def __init__(
        self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], values: Mapping[int, Tensor]
    ) -> None:
        self.modules = list(modules)
        self.copies: dict[int, Any] = {}
        self.training: bool | None = None
        self._values = values
        self._module_ids = {id(m) for m in self.modules}
        self._own = [vars(m) for m in self.modules]
        self._grads: list[tuple[Tensor, Tensor | None]] = []
        self._staged = [self._attributes(m) for m in self.modules]
        self.optimizers = [self._optimizer(o) for o in optimizers]

    def enter(self) -> None:
        # A step of the user's own may run backward to parameters that it holds itself.
        self._grads = [(t, t.grad) for m in self.modules for t in m._parameters.values() if t is not None]
        for parameter, _ in self._grads:
            parameter.grad = None
        for module, attributes in zip(self.modules, self._staged, strict=True):
            object.__setattr__(module, "__dict__", attributes)

    def leave(self) -> None:
        """Give the modules back what they held. May be called twice."""
        for module, attributes in zip(self.modules, self._own, strict=True):
            object.__setattr__(module, "__dict__", attributes)
        for parameter, grad in self._grads:
            parameter.grad = grad

    @contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        """Keep every module in a mode meanwhile."""
        before, modes = self.training, [m.training for m in self.modules]
        self.keep(training)
        try:
            yield
        finally:
            self.training = before
            for module, was in zip(self.modules, modes, strict=True):
                vars(module)["training"] = was

    def keep(self, training: bool) -> None:
        """Put every module in a mode, and let nobody ask for another."""
        self.training = training
        for module in self.modules:
            vars(module)["training"] = training

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        found = {name: self._copied(value) for name, value in vars(module).items()}
        for name, value in found.items():
            if "hook" in name and type(value) in (dict, OrderedDict):
                ours = [key for key, hook in value.items() if is_owned(hook)]
                for key in ours:
                    del value[key]
        found["train"] = partial(self._train, module, found.get("train"))
        return found

    def _train(self, module: nn.Module, own: Any, mode: bool = True) -> nn.Module:
        if self.training is None:
            if own is not None:
                own(mode)
            else:
                type(module).train(module, mode)
        return module

    def _copied(self, value: Any, depth: int = 12) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        kind = type(value)
        if kind not in _CONTAINERS and not hasattr(kind, "_fields"):
            return value
        if not depth:
            return value
        if isinstance(value, dict):
            made = copy.copy(value)
            for key, item in value.items():
                made[key] = self._copied(item, depth - 1)
            return made
        items = [self._copied(item, depth - 1) for item in value]
        if isinstance(value, deque):
            return deque(items, value.maxlen)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)

    def _tensor(self, tensor: Tensor) -> Tensor:
        known = self.copies.get(id(tensor))
        if known is None:
            values = self._values.get(id(tensor), tensor)
            known = self.copies[id(tensor)] = made = _copy(tensor, values)
            # With what it is the copy of: another tensor could get its number.
            self.copies[id(made)] = made
        return known

    def _optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return a copy that steps the copies. Whatever it holds is copied, other optimizers inside of it too."""
        return copy_of(optimizer, self._tensor)


def copy_of(optimizer: Optimizer, stand_in: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> Optimizer:
    """Return an optimizer with a copy of all that another holds, without its hooks and schedulers.

    Args:
        optimizer: of torch's; others that it holds are copied with it.
        stand_in: gives the parameter that the copy steps in the place of one.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo: dict[int, Any] = {number: stand_in(p) for number, p in held.items()}
    made = object.__new__(type(optimizer))
    memo[id(optimizer)] = made
    for name, value in vars(optimizer).items():
        if name in _HOOKS:
            vars(made)[name] = OrderedDict()
        elif name != "step":  # a scheduler counts its steps there
            vars(made)[name] = copy.deepcopy(value, memo)
    return made


def bytes_of(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> int:
    """Return the bytes that copies of a training take: parameters and their gradients, buffers, optimizers' states."""
    params = [p for m in modules for p in m._parameters.values() if p is not None]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    states = [dict(enumerate(optimizer.state.values())) for optimizer in optimizers]
    trained = [p for p in params if p.requires_grad]
    return size_of(params) + size_of(trained) + size_of(buffers) + size_of(states)


def _copy(tensor: Tensor, values: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        # Of another library's making: quantised weights, for one, which nobody trains.
        return copy.deepcopy(tensor) if tensor.requires_grad else tensor
    with torch.no_grad():
        made: Tensor = values.detach().clone()
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
        vars(made).update(vars(tensor))
    elif tensor.is_leaf and tensor.requires_grad:
        made.requires_grad_()
    return made


@contextmanager
def on_stage(
    modules: Sequence[nn.Module], optimizers: Sequence[Optimizer], values: Mapping[int, Tensor] | None = None
) -> Iterator[Stage]:
    """Let modules hold copies while the body runs, and then what they held before, also where the body raises.

    Args:
        modules: all that are to hold copies (see `modules_of`).
        optimizers: that step their parameters.
        values: id of a tensor -> the values that its copy gets, where not its own.
    """
    stage = Stage(modules, optimizers, values or {})
    try:
        stage.enter()
        yield stage
    finally:
        insist(stage.leave)


def modules_of(*roots: Any) -> list[nn.Module]:
    """Return all modules below these, also those that a module keeps in plain lists and dicts."""
    found: dict[int, nn.Module] = {}
    left = [root for root in roots if isinstance(root, nn.Module)]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += _held(vars(module))
    return list(found.values())


def _held(value: Any, depth: int = 4) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if not depth or type(value) not in _CONTAINERS:
        return []
    items = value.values() if isinstance(value, dict) else value
    return [module for item in list(items) for module in _held(item, depth - 1)]


def why_not_copied(model: nn.Module, modules: Sequence[nn.Module], optimizers: Sequence[Any]) -> str:
    """Return why a model can't train on copies; "" where it can."""
    if is_flat_sharded(model) or any(hasattr(p, "_local_tensor") for p in model.parameters()):
        return "its parameters lie in pieces on several ranks (FSDP, tensor parallelism)"
    if any(map(is_split_by_zero, model.parameters())):
        return "DeepSpeed's ZeRO looks after its parameters"
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        return "it is compiled by TorchScript, whose parameters can't be replaced"
    if any(isinstance(p, nn.UninitializedParameter) or p.is_meta for p in model.parameters()):
        return "it has parameters without values"
    strange = next((o for o in optimizers if not isinstance(o, Optimizer)), None)
    if strange is not None:
        return f"{type(strange).__name__} is none of torch's optimizers, and can't be copied"
    return ""
