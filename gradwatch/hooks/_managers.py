"""Managers that know of each other: a notebook cell run again leaves a second one on the same model."""

from __future__ import annotations

import weakref
from sys import getrefcount
from typing import TYPE_CHECKING

from .._warn import warn

if TYPE_CHECKING:
    from ._hook import Hook
    from ._manager import HookManager

__all__ = ["enter", "tell_of_abandoned"]

_open: weakref.WeakSet[HookManager] = weakref.WeakSet()


def enter(manager: HookManager) -> None:
    """Note a new manager; one of the same name on the same model is closed."""
    for other in _others(manager):
        if manager.name is not None and other.name == manager.name:
            other.close()
    _open.add(manager)


def tell_of_abandoned(manager: HookManager, hook: Hook) -> None:
    """Warn where an earlier manager that nobody holds any more still acts on the same model: the new hooks come on top
    of its own."""
    if len(manager) or hook.observes:
        return
    others = _others(manager)
    for number in range(len(others)):  # by number: a name would be one more that holds it
        acting = [known for known in others[number].hooks if not known.observes]
        if acting and getrefcount(others[number]) <= _UNHELD:
            warn(
                f"an earlier HookManager of this {type(manager.model).__name__}, which nobody holds any more, still "
                f"acts ({acting[0].id!r} at {acting[0].points[0]!s}): the new hooks come on top. close() it, use "
                "`with`, or give both a name: HookManager(model, name='mine') takes the place of the last.",
                stacklevel=4,
            )
            return


def _others(manager: HookManager) -> list[HookManager]:
    return [m for m in list(_open) if m is not manager and m.model is manager.model and not m.is_closed]


def _unheld_references() -> int:
    """Return how many references a manager has, asked as above, that only its own hooks keep: a matter of the Python
    version."""
    others = [object()]
    its_hooks = [others[0]]
    return getrefcount(others[0]) + 0 * len(its_hooks)


_UNHELD = _unheld_references()
