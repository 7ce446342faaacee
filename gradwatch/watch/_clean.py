"""Optimizers that are known to leave everything as it is where a gradient is None: a list that tests prove."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ..torchside import is_owned, storage

__all__ = ["CLEAN", "fires", "has_own_step", "is_clean", "steps_undisturbed"]

CLEAN = frozenset(
    f"torch.optim.{name}"
    for name in (
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD", "SparseAdam"),
    )
) | frozenset(
    (
        *("bitsandbytes.optim.adamw.AdamW", "bitsandbytes.optim.adamw.AdamW8bit", "bitsandbytes.optim.lion.Lion8bit"),
        *("lion_pytorch.lion_pytorch.Lion", "torchao.optim.adam.AdamW4bit", "torchao.optim.adam.AdamW8bit"),
        *("torchao.optim.adam.AdamWFp8", "transformers.optimization.Adafactor"),
    )
)
"""By exact type: a subclass may do anything."""


_GLOBAL_HOOKS: Any = getattr(torch_optimizer, "_global_optimizer_pre_hooks", (None,))


def is_clean(optimizer: Any) -> bool:
    """Return whether this optimizer is of a known class, and runs that class's own step and nobody's hooks."""
    return _name(type(optimizer)) in CLEAN and has_own_step(optimizer) and not _has_hooks(optimizer)


def fires(optimizer: Any) -> bool:
    """Return whether hooks on this optimizer's step are called: the methods to hang them on prove nothing."""
    return isinstance(optimizer, Optimizer) and bool(getattr(type(optimizer).step, "hooked", False))


def _name(cls: type) -> str:
    if getattr(torch.optim, cls.__name__, None) is cls:
        return f"torch.optim.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def has_own_step(optimizer: Any) -> bool:
    """Return whether calling `step` calls the class's own, and nothing of the user's around it."""
    own = type(optimizer).step
    # Asked at every step: to walk through the class for slots takes longer than all the rest. A function is no slot.
    held = getattr(optimizer, "__dict__", None) if type(own) is FunctionType else None
    step = (held if type(held) is dict else storage(optimizer)).get("step")
    if step is None or getattr(step, "__func__", None) is own:
        return True
    # Learning rate schedulers and Accelerate wrap it, to note that it was called.
    wraps_own = getattr(step, "_wrapped_by_lr_sched", False) and getattr(step, "__wrapped__", None) is own
    return wraps_own or str(getattr(step, "__module__", "")).startswith("accelerate.")


def steps_undisturbed(optimizer: Any) -> bool:
    """Return whether nothing of anybody else's runs from the call of its step until our hook on it is called."""
    held = getattr(optimizer, "__dict__", None)
    hooks = held.get("_optimizer_step_pre_hooks") if type(held) is dict else None
    return hooks is not None and len(hooks) == 1 and not _GLOBAL_HOOKS and has_own_step(optimizer)


def _has_hooks(optimizer: Any) -> bool:
    """Return whether somebody else's hooks run in its step: they may move what they like."""
    tables = [storage(optimizer).get(f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    tables += [getattr(torch_optimizer, f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]
    return any(not is_owned(hook) for table in tables for hook in table.values())
