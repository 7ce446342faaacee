"""What kind of training this is: said by the user, or inferred from model, loss and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records import TRAINING_KINDS, Index, kind_scalars
from ..rules import kinds_of_index

__all__ = ["Kind"]


class Kind:
    """The kinds of one training, as they become known.

    Args:
        given: a name, or "auto".

    Attributes:
        scalars: that say so on a record.
        index: of what was trained when they were last looked at.
    """

    def __init__(self, given: str) -> None:
        self._is_given = given != "auto"
        self._seen: set[str] = {given} if self._is_given else set()
        self.index: Index | None = None
        self._optimizer: int | None = None
        self.scalars: Mapping[str, float] = kind_scalars(self._seen)

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds in their order."""
        return tuple(kind for kind in TRAINING_KINDS if kind in self._seen)

    def step(self, index: Index, optimizer: int | None, others: int) -> None:
        """Take in what is trained at a step, by which of several optimizers, and in which company."""
        if self._is_given:
            return
        if index is not self.index:
            self.index = index
            self._add(*kinds_of_index(index))
        if others or (optimizer is not None and self._optimizer not in (None, optimizer)):
            self._add("adversarial")
        self._optimizer = optimizer

    def loss(self, form: Mapping[str, Any]) -> None:
        """Take in how the loss was made."""
        if not self._is_given and form.get("loss_of_chosen") == 1:
            self._add("rl")

    def _add(self, *kinds: str) -> None:
        if not self._seen.issuperset(kinds):
            self._seen.update(kinds)
            self.scalars = kind_scalars(self._seen)
