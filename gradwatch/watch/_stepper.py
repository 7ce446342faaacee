"""Optimizers as trainers hand them over: the torch optimizer inside, and how the whole is stepped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ConfigError
from ..torchside import storage

__all__ = ["Stepper", "chosen", "raw_optimizer", "steppers"]


class Stepper:
    """One optimizer, perhaps inside Accelerate's or Fabric's wrapper, or inside one of the user's own (a Lookahead).

    Hooks and measurements belong to the torch optimizer; the step to whatever was handed over, since a wrapper looks
    after loss scaling, accumulation and sharding by itself.

    Attributes:
        given: what was handed over.
        raw: the torch optimizer inside; of a wrapper that takes no hooks, the one it holds that does, if any.
        scaler: the loss scaler that the wrapper steps and updates by itself, or None.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self.raw: Any = _raw(given)
        self.scaler = None if given is self.raw else _enabled(_scaler_of(given))

    @property
    def is_syncing(self) -> bool:
        """Whether a step called now moves anything: Accelerate's is without effect while gradients accumulate."""
        state = _attribute(self.given, "gradient_state") if self.given is not self.raw else None
        return bool(getattr(state, "sync_gradients", True))

    @property
    def scaled(self) -> Any:
        """What a loss scaler of the user's knows this optimizer by."""
        return self.given if self.scaler is None else self.raw

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.given.step() if closure is None else self.given.step(closure)

    def pass_over(self) -> None:
        """Say that a micro-batch is over after which nothing moves."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a loss, as those must who step what this steps."""
        loss.backward()


def steppers(given: Any) -> tuple[Stepper, ...]:
    """Return a stepper for each optimizer that a door was given: one, or several.

    Raises:
        ConfigError: there is none, or something that is no optimizer.
    """
    several: Sequence[Any] = [given] if not _is_sequence(given) else list(given)
    if not several:
        raise ConfigError("`optimizer` must hold at least one torch optimizer. Got none.")
    return tuple(Stepper(o) for o in several)


def _is_sequence(given: Any) -> bool:
    return hasattr(type(given), "__iter__") and not _is_optimizer(given)


def chosen(known: tuple[Stepper, ...], optimizer: Any) -> tuple[Stepper, ...]:
    """Return the one of these that was made of an optimizer; all of them where it is None.

    Raises:
        ConfigError: it is none of these.
    """
    if optimizer is None:
        return known
    found = tuple(s for s in known if optimizer is s.given or optimizer is s.raw)
    if not found:
        name = type(optimizer).__name__
        raise ConfigError(f"this Watch does not know the {name} it was given: name it in Watch(model, [...]).")
    return found


def raw_optimizer(given: Any) -> Any:
    """Return the optimizer inside of one that a trainer holds; itself where nothing is found inside. Never raises."""
    with suppress(ConfigError):
        return _raw(given)
    return given


def _raw(given: Any) -> Any:
    inner = given
    while not type(inner).__module__.startswith("torch."):
        deeper = _attribute(inner, "optimizer")
        if not isinstance(deeper, Optimizer) or deeper is inner:
            break
        inner = deeper
    if not _is_optimizer(inner):
        raise ConfigError(f"`optimizer` must be a torch optimizer or several. Got {type(given).__name__}.")
    return inner if _takes_hooks(inner) else _inside(inner) or inner


def _inside(wrapper: Any, depth: int = 3) -> Any:
    """Return the optimizer that a wrapper without step hooks holds under whatever name, for the same parameters."""
    held = [o for o in storage(wrapper).values() if o is not wrapper and _is_optimizer(o)]
    held = [o for o in held if _parameters(o) == _parameters(wrapper)]
    found = [o if _takes_hooks(o) else _inside(o, depth - 1) for o in held] if depth else []
    return next((o for o in found if o is not None), None)


def _is_optimizer(given: Any) -> bool:
    """Whether this is an optimizer by what it does: users' own need not derive from torch's."""
    return _parameters(given) is not None and callable(_attribute(given, "step"))


def _takes_hooks(optimizer: Any) -> bool:
    # One that never called `Optimizer.__init__` has the methods, but nowhere to keep the hooks.
    if isinstance(optimizer, Optimizer):
        return isinstance(_attribute(optimizer, "_optimizer_step_pre_hooks"), dict)
    return callable(_attribute(optimizer, "register_step_pre_hook"))


def _parameters(optimizer: Any) -> set[int] | None:
    try:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}
    except Exception:
        return None


def _attribute(given: Any, name: str) -> Any:
    # A wrapper's properties may raise.
    try:
        return getattr(given, name, None)
    except Exception:
        return None


def _scaler_of(given: Any) -> Any:
    """Accelerate's wrapper holds its scaler; Fabric's holds a strategy that holds a precision that does."""
    found = _attribute(given, "scaler")
    if found is None:
        found = _attribute(_attribute(_attribute(given, "_strategy"), "precision"), "scaler")
    return found


def _enabled(scaler: Any) -> Any:
    return scaler if scaler is not None and hasattr(scaler, "is_enabled") and scaler.is_enabled() else None
