"""The Lightning callback that the environment asked for, not the script."""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakSet

from .lightning import GradWatch

__all__ = ["trainer_callback"]

_MADE: dict[type[Any], Any] = {}


class _FromEnvironment(GradWatch):
    """A GradWatch that steps back where the script has one of its own.

    Lightning appends it to the very list that the script gave. Where that list goes to one Trainer after another, the
    callbacks of the earlier ones come along: they are told apart by age, and step back too.
    """

    _living: ClassVar[WeakSet[Any]] = WeakSet()
    _base: ClassVar[type[Any] | None] = None
    _may_step_back = True
    _in_charge = False
    _stepped_back = False

    def __init__(self, rules: Any = "default", **settings: Any) -> None:
        super().__init__(rules, **settings)
        self._age = 0
        for older in self._living:
            # A Trainer is being made: what is among its callbacks already must not have the new one's key.
            older._age += 1
            older._in_charge = False
        self._living.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Its class may be one made here: no name leads to it.
        return _blank, (self._base,), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of the script's list holds copies: they age as well. No two are of one age: a list may hold both.
        self.__dict__.update(state)
        ages = {other._age for other in self._living}
        while self._age in ages:
            self._age += 1
        self._in_charge = False
        self._living.add(self)

    @property
    def state_key(self) -> str:
        # The one in charge keeps its key from run to run, whatever Trainers were made since.
        key = f"gradwatch:{self.settings.name}:environment"
        return key if self._in_charge or not self._age else f"{key}:{self._age}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._look_around(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._look_around(trainer)
        if self._in_charge:
            super().on_train_start(trainer, pl_module)
        elif self._session is not None:
            # Of the Trainer that it was made for; nothing of this fit is its own.
            self._session.close()
            self._session = None

    def _look_around(self, trainer: Any) -> None:
        self._stepped_back = any(self._yields_to(callback) for callback in trainer.callbacks)
        self._in_charge = not self._stepped_back

    def _yields_to(self, callback: Any) -> bool:
        if isinstance(callback, _FromEnvironment):
            return callback._age < self._age
        return isinstance(callback, GradWatch)

    def state_dict(self) -> dict[str, Any]:
        if self._stepped_back:
            return {}
        # Asked for its state before its key, by the Trainer that saves.
        self._in_charge = self._in_charge or self._session is not None
        return super().state_dict()


def trainer_callback(base: type[Any], rules: str, **settings: Any) -> Any:
    """Return a callback that is a `Callback` of the package that asks, whatever was imported first."""
    return _class_for(base)(rules, **settings)


def _class_for(base: type[Any] | None) -> Any:
    if base is None or issubclass(_FromEnvironment, base):
        return _FromEnvironment
    if base not in _MADE:
        _MADE[base] = type("GradWatch", (_FromEnvironment, base), {"_base": base})
    return _MADE[base]


def _blank(base: type[Any] | None) -> Any:
    made = _class_for(base)
    return made.__new__(made)
