"""What a rule can do to the training."""

from __future__ import annotations

from typing import Any

from ..protocols import Action, Treatment
from ._rule import Rule

__all__ = ["actions_of", "can_decide", "has_limit", "then_of", "treatments_of"]


def then_of(rule: Rule) -> tuple[Any, ...]:
    """Return what runs when it fires."""
    return tuple(rule.then)  # type: ignore[arg-type]  # one alone has become a tuple


def treatments_of(rule: Rule) -> tuple[Treatment, ...]:
    """Return what changes gradients when it fires."""
    return tuple(item for item in then_of(rule) if isinstance(item, Treatment))


def actions_of(rule: Rule) -> tuple[Action, ...]:
    """Return what asks something of the trainer when it fires."""
    return tuple(item for item in then_of(rule) if isinstance(item, Action))


def can_decide(rule: Rule) -> bool:
    """Return whether it can change the training: it treats, asks or stops."""
    return bool(then_of(rule) or rule.stop_after)


def has_limit(rule: Rule) -> bool:
    """Return whether it says which norms it accepts."""
    return type(rule).limit is not Rule.limit
