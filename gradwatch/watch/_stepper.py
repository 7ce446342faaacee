"""Optimizers as trainers hand them over: the torch optimizer inside, and how the whole is stepped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from ..errors import ConfigError

__all__ = ["Stepper", "chosen", "steppers"]


class Stepper:
    """One optimizer, perhaps inside Accelerate's or Fabric's wrapper, or inside one of the user's own (a Lookahead).

    Hooks and measurements belong to the torch optimizer; the step to whatever was handed over, since a wrapper looks
    after loss scaling, accumulation and sharding by itself.

    Attributes:
        given: what was handed over.
        raw: the torch optimizer inside.
        scaler: the loss scaler that the wrapper steps and updates by itself, or None.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self.raw: Optimizer = _raw(given)
        self.scaler = None if given is self.raw else _enabled(_scaler_of(given))

    @property
    def is_syncing(self) -> bool:
        """Whether a step called now moves anything: Accelerate's is without effect while gradients accumulate."""
        state = getattr(self.given, "gradient_state", None) if self.given is not self.raw else None
        return bool(getattr(state, "sync_gradients", True))

    def step(self) -> None:
        self.given.step()


def steppers(given: Any) -> tuple[Stepper, ...]:
    """Return a stepper for each optimizer that a door was given: one, or several.

    Raises:
        ConfigError: there is none, or something that is no optimizer.
    """
    several: Sequence[Any] = [given] if isinstance(given, Optimizer) or not _is_sequence(given) else list(given)
    if not several:
        raise ConfigError("`optimizer` must hold at least one torch optimizer. Got none.")
    return tuple(Stepper(o) for o in several)


def _is_sequence(given: Any) -> bool:
    return hasattr(given, "__iter__")


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


def _raw(given: Any) -> Optimizer:
    inner = given
    while not type(inner).__module__.startswith("torch."):
        deeper = getattr(inner, "optimizer", None)
        if not isinstance(deeper, Optimizer) or deeper is inner:
            break
        inner = deeper
    if not isinstance(inner, Optimizer):
        raise ConfigError(f"`optimizer` must be a torch optimizer or several. Got {type(given).__name__}.")
    return inner


def _scaler_of(given: Any) -> Any:
    """Accelerate's wrapper holds its scaler; Fabric's holds a strategy that holds a precision that does."""
    found = getattr(given, "scaler", None)
    if found is None:
        found = getattr(getattr(getattr(given, "_strategy", None), "precision", None), "scaler", None)
    return found


def _enabled(scaler: Any) -> Any:
    return scaler if scaler is not None and hasattr(scaler, "is_enabled") and scaler.is_enabled() else None
